"""Lets the tests import what is in scripts/, which is not installed, however pytest was started."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
