"""The ``jaxprop`` command, also run by ``python -m jaxprop``."""

import os
import signal
import sys

from jaxprop.cli import main


def run() -> None:
    """Run the command and exit. Ctrl-C and a closed pipe end it at once, without a traceback."""
    for name in ("SIGINT", "SIGPIPE"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        status = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        print(f"jaxprop: {error.strerror or error}", file=sys.stderr)
        status = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the last flush does not fail again
    sys.exit(status)


if __name__ == "__main__":
    run()
