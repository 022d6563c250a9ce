"""``python -m lightning_fedsparse``: the ``fedsparse`` command, for launchers that start a module, such as ``torchrun``."""

import sys

from lightning_fedsparse.cli import main

if __name__ == "__main__":
    sys.exit(main())
