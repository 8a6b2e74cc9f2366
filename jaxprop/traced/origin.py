"""The origin of an equation in the user's source: file, line and named scope."""

from __future__ import annotations

import linecache
import os
import sysconfig
import traceback
from typing import NamedTuple

from jax.extend import source_info_util
from jax.extend.core import JaxprEqn

LIBRARY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INSTALLED = (LIBRARY, *sysconfig.get_paths().values())  # no user's code lies there
EXPLAINING = os.path.join(LIBRARY, "explanation", "")


class Origin(NamedTuple):
    """The origin of an equation.

    Attributes:
        line: the file and the line; "" if they are not known.
        scope: the named scope, from ``jax.named_scope`` or a Flax module.
    """

    line: str
    scope: str


class Line(NamedTuple):
    """A line of a source file."""

    file: str
    number: int

    @property
    def name(self) -> str:
        """The file and the number; the folders of the file are left out, except in this library."""
        ours = self.file.startswith(LIBRARY + os.sep)
        file = os.path.relpath(self.file, os.path.dirname(LIBRARY)) if ours else self.file
        return f"{file if ours else os.path.basename(file)}:{self.number}"

    @property
    def text(self) -> str:
        """The text of the line; "" for a file that cannot be read."""
        return linecache.getline(self.file, self.number).strip()


def origin_of(equation: JaxprEqn) -> Origin:
    """Return the innermost origin of an equation, outside installed packages if possible."""
    info = equation.source_info
    scope, line = str(info.name_stack), line_of(equation)
    if line is not None:
        return Origin(line.name, scope)
    return Origin(os.path.basename(source_info_util.summarize(info)), scope)


def line_of(equation: JaxprEqn, ours: bool = False) -> Line | None:
    """Return the innermost line outside installed packages, or None.

    Args:
        equation: the equation.
        ours: whether a line of this library is accepted too.
    """
    for frame in getattr(equation.source_info.traceback, "frames", ()):
        name = frame.file_name
        if name.startswith(EXPLAINING):  # the caller that asked for the trace
            break
        if is_users(name) or (ours and name.startswith(LIBRARY + os.sep)):
            return Line(name, frame.line_num)
    return None


def line_of_error(error: BaseException, inside: str) -> Line | None:
    """Return the innermost line outside installed packages at which an error arose.

    Args:
        error: the error.
        inside: a file; the frames that called into it do not count.
    """
    found, within = None, False
    for frame, number in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        within |= name == inside
        if within and is_users(name):
            found = Line(name, number)
    return found


def is_users(file: str) -> bool:
    """Return whether a source file lies outside installed packages."""
    return not file.startswith((*INSTALLED, "<frozen"))
