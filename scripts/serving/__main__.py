"""`python -m scripts.serving`: serve an archive with TorchServe, in the foreground."""

import sys

from scripts.serving.launcher import main

if __name__ == "__main__":
    sys.exit(main())
