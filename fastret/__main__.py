"""``python -m fastret``: the command line."""

import sys

from fastret.cli import main

sys.exit(main())
