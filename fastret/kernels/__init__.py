"""Floor 1: GPU kernels. ``fastret.kernels.triton`` is the folder kernels/triton of the repository, installed or not."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if (_ROOT / "setup.py").is_file() and (_ROOT / "kernels" / "triton").is_dir():
    __path__.append(str(_ROOT / "kernels"))
