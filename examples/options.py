"""The command line of the examples: options with defaults, and exits without a traceback."""

import argparse
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

Option = tuple[str, Callable[[str], Any] | Collection[str], Any, str]


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def natural(text: str) -> int:
    """Parse a whole number from 0 to 2^31 - 1."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^31 - 1, not {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    """Parse a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return number


def directory(text: str) -> Path:
    """Parse the path of a directory, which need not exist."""
    return Path(text)


def picture(text: str) -> Path:
    """Parse the path of a file to be written, in a directory that exists."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{path} must end with .png, .pdf or .svg")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: no such directory")
    return path


METAVARS = {positive: "N", natural: "N", above_zero: "X", directory: "DIR", picture: "PNG"}


class Parser(argparse.ArgumentParser):
    """A parser whose help has a line for each option, in 80 columns.

    Args:
        description: what the script does.
    """

    def __init__(self, description: str) -> None:
        lines = functools.partial(argparse.HelpFormatter, max_help_position=30, width=80)
        super().__init__(description=description, formatter_class=lines)

    def add(self, *options: Option) -> None:
        """Add options.

        Args:
            options: for each option its name, its type or its choices, its default, and its
                meaning, to which the help adds the default if that is not None.
        """
        for name, kind, default, meaning in options:
            help = meaning if default is None else f"{meaning} (default: %(default)s)"
            if callable(kind):
                settings: dict[str, Any] = {"type": kind, "metavar": METAVARS[kind]}
            else:
                settings = {"choices": kind}
            self.add_argument(f"--{name}", default=default, help=help, **settings)

    def add_checkpoints(self, every: str) -> None:
        """Add the options of a run that saves checkpoints and can resume from them."""
        self.add(("checkpoints", directory, None, f"save the state {every}"))
        self.add_argument(
            "--resume", action="store_true", help="continue from the newest checkpoint"
        )

    def parse(self) -> argparse.Namespace:
        """Return the options of the command line."""
        args = self.parse_args()
        if getattr(args, "resume", False) and args.checkpoints is None:
            self.error("--resume needs --checkpoints DIR")
        return args


def reader_left(error: BaseException) -> bool:
    """Return whether an error means that nobody reads standard output (``script.py | head``).

    SIGPIPE is not reset to its default, which ends a process at once: it would do so for any closed
    pipe or socket, including one that saves a checkpoint.
    """
    if isinstance(error, BrokenPipeError):
        try:
            print(flush=True)  # a new write: the one that failed is not kept
        except BrokenPipeError:
            return True
    return False


def run(main: Callable[[], Any]) -> None:
    """Run a script. Ctrl-C ends it with one line, and a closed pipe without any."""
    signal.signal(signal.SIGINT, _interrupted)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError as error:
        if not reader_left(error):
            raise
        os._exit(128 + 13)  # a shell's exit status for a process ended by SIGPIPE


def _interrupted(*_: object) -> None:
    """End the process at once: a save in progress would take an exception for a failure."""
    print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
    with contextlib.suppress(BrokenPipeError, RuntimeError):  # a closed pipe, or during a print
        sys.stdout.flush()
    os._exit(128 + 2)
