"""Reading of numpy's files in threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_TRIES = 10


def parsed(read: Callable[..., T], *arguments: str) -> T:
    """Read an array, again where CPython says that its parser was disturbed.

    numpy parses the header of an array as Python. Of threads that do so at the same time one may get
    "SystemError: AST constructor recursion depth mismatch", seen with CPython 3.11 (python/cpython#106905).

    Args:
        read: Reads it; called up to ten times.
        arguments: For ``read``.
    """
    for _ in range(_TRIES - 1):
        try:
            return read(*arguments)
        except SystemError:
            continue
    return read(*arguments)
