"""python -m sparse_stgcn: what this installation can do, and its commands."""
from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
