"""Functional forms of the losses."""

from fastret.losses.smooth_ap import smooth_ap

__all__ = ["smooth_ap"]
