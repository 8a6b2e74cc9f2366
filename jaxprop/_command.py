"""The first import of the package: it lets Ctrl-C end the command while JAX is imported."""

import os
import signal
import sys

command = sys.argv[0] if sys.argv else ""
if os.path.basename(command) in ("jaxprop", "jaxprop.exe") or (
    command == "-m" and "jaxprop" in sys.orig_argv
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
