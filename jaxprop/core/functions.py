"""Plain functions with names of their own, as makers return them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def named(name: str, doc: str | None = None) -> Callable[[F], F]:
    """Return a decorator that gives a function a name, for ``help``, ``repr`` and error messages.

    Args:
        name: the name of the maker that the user called.
        doc: the function's docstring, if it has none of its own.
    """

    def rename(f: F) -> F:
        f.__name__ = f.__qualname__ = name
        f.__doc__ = doc or f.__doc__
        return f

    return rename
