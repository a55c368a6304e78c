"""Explain many images without a server: see `command.py`."""

import importlib.util
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the imports take their seconds; `main` has more to put in order
    if importlib.util.find_spec("pyarrow") is None:
        sys.exit("error: scripts.bulk needs pyarrow, which is not installed: .venv/bin/python -m pip install pyarrow")
    from scripts.bulk.command import main

    sys.exit(main())
