"""``python -m jaxprop``, and the ``jaxprop`` command."""

import signal
import sys

from jaxprop.cli import main


def run() -> None:
    """Run the command; Ctrl-C and a closed pipe end it at once, without a word."""
    for name in ("SIGINT", "SIGPIPE"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
