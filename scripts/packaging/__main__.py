"""`python -m scripts.packaging`: build the archive that TorchServe serves."""

import sys

from scripts.packaging.package import main

if __name__ == "__main__":
    sys.exit(main())
