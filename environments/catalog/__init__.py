"""The catalog of environments, shipped as data: one file of lines a library."""
