"""What JAX compiles while something runs."""

import contextlib
import logging

import jax


@contextlib.contextmanager
def compilations():
    """Collects what JAX logs of compiling."""
    lines, logger, handler = [], logging.getLogger("jax"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield lines
    finally:
        logger.removeHandler(handler)
