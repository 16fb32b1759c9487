"""How much memory a strip of scores may take on a GPU: FASTRET_WORKSPACE, bytes or a number with KiB, MiB or GiB."""

import os
import re

UNITS = {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}

_workspace = os.environ.get("FASTRET_WORKSPACE") or "128MiB"


def workspace() -> int:
    """Bytes for a block of scores, and its weights or the rows it is made of.

    Raises:
        ValueError: FASTRET_WORKSPACE is no such number.
    """
    match = re.fullmatch(rf"(\d+) ?({'|'.join(UNITS)})", _workspace)
    if match is None or int(match[1]) == 0:
        raise ValueError(
            f"FASTRET_WORKSPACE: expected a positive number of bytes, or one with KiB, MiB or GiB, got {_workspace!r}"
        )
    return int(match[1]) << UNITS[match[2]]
