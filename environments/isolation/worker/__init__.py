"""The program that serves a library in its own interpreter; it is run by path and never imported."""
