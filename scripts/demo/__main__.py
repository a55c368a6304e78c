"""`python -m scripts.demo`: serve the model and a page to draw on."""

import sys

from scripts.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
