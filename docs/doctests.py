"""An extension of Griffe's: examples in docstrings stand in fences of their own, as code."""

from __future__ import annotations

import re
import typing

import griffe

_BLOCK = re.compile(r"^>>> .*(?:\n(?!\s*$).+)*", re.MULTILINE)


def fence(text: str) -> str:
    """A docstring with each block that begins with `>>>` in a fence, up to the next empty line."""
    return _BLOCK.sub(lambda found: f"```pycon\n{found.group()}\n```", text)


class Doctests(griffe.Extension):
    """Fences the examples of whatever is documented."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: typing.Any) -> None:
        """Called by Griffe for each object that it has read."""
        if obj.docstring:
            obj.docstring.value = fence(obj.docstring.value)
