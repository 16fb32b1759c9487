"""Quickstart training of a small embedding network on real data."""

from fastret.training.interrupt import Interrupted
from fastret.training.options import TrainOptions
from fastret.training.run import train

__all__ = ["Interrupted", "TrainOptions", "train"]
