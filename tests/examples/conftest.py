"""Lets the tests import what is in examples/, which is not installed, however pytest was started; a few images."""

import sys
from pathlib import Path

import pytest
import torch

from fastret.data import ImageSet, load_glyphs

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.fixture
def few_glyphs() -> tuple[ImageSet, ImageSet]:
    """Three fonts of 60 characters to train on, the fourth to be found."""
    whole = load_glyphs()
    test = torch.arange(240) % 4 == 3
    train, found = (
        ImageSet(whole.images[:240][rows], whole.labels[:240][rows], whole.class_names[:60], 60)
        for rows in (~test, test)
    )
    return train, found
