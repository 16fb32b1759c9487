"""Lets the tests import gate.py beside them, however pytest was started."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
