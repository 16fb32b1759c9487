"""Lets the tests import ``benchmarks``, which is not installed, however pytest was started."""

import sys
from pathlib import Path

# Last, so that an installed fastret is still found before the one of the checkout.
sys.path.append(str(Path(__file__).resolve().parents[2]))
