"""The program that serves a library in its own interpreter, and how it and the adapter of Gymnasium call libraries.

Interpreters of libraries are given this folder alone, under the name `ldm_jax_worker`.
"""
