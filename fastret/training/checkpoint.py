"""checkpoint.pt: everything a run needs to go on exactly where it stood."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"
KEYS = {"options", "before", "trainer"}


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write ``folder``/checkpoint.pt: whole or not at all, whenever the process ends."""
    unfinished = folder / f"{NAME}.{os.getpid()}.tmp"
    try:
        torch.save(state, unfinished)
        os.replace(unfinished, folder / NAME)
    finally:
        unfinished.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote; tensors and plain values only, so a foreign file cannot run code.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is something else, or damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {NAME} to resume from in {folder}")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    if not isinstance(state, dict) or state.keys() != KEYS:
        raise ValueError(f"{path} is no checkpoint of fastret train")
    return state
