"""One interface over every environment library.

Importing this package imports neither JAX nor any environment library: each public name is loaded when it is first
used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
