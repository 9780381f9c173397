"""Ways into libraries that put nothing into the registry of Gymnasium: one module per library.

A module here is loaded by the worker program, in the library's own interpreter: it may import the standard library,
numpy, Gymnasium, and inside its functions the library. Its function `register()` puts the library's environments into
the registry, under ids made of the library's own names; nothing is made before it is asked for.
"""
