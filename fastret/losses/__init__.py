"""Floor 4: losses as formulas over what ops return. One file per family."""

from fastret.losses.smooth_ap import SmoothAP

__all__ = ["SmoothAP"]
