"""How the values of anchors become a loss: one vocabulary for every loss."""

import torch
from torch import Tensor, nn

from fastret.backends.rows import accumulation_dtype

REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def reduce_valid(values: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    """Mean over valid anchors (0, connected to the graph, where there are none), sum, or (N,) with 0 where invalid;
    None: all are valid."""
    if valid is not None:
        values = values * valid  # not a selection: NaN stays visible, and nothing waits for the device
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    return total / (max(values.shape[0], 1) if valid is None else valid.sum().clamp_min(1))


def over_temperature(temperature: float | Tensor, rows: Tensor) -> float | Tensor:
    """1 / tau, the scale of logits of these rows; of a half precision tensor it is not rounded to half precision.

    Raises:
        ValueError: tau is a tensor on another device.
    """
    if not isinstance(temperature, Tensor):
        return 1 / temperature
    if temperature.device != rows.device:
        raise ValueError(f"temperature: expected device {rows.device} like the rows, got {temperature.device}")
    return 1 / temperature.to(torch.promote_types(temperature.dtype, accumulation_dtype(rows.dtype)))


def log1p_exp(z: Tensor) -> Tensor:
    """log(1 + e^z): of z = a log-sum-exp, the same with one more logit, 0; 0 without a slope at -inf."""
    return nn.functional.softplus(z, threshold=40)  # the default takes z beyond 20: 2e-9 off in float64


def row_weights(rows: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    """(N,) constants whose weighted sum of row losses is "mean" over valid rows, or "sum"."""
    count, wide = rows.shape[0], accumulation_dtype(rows.dtype)
    if valid is None:
        return rows.new_full((count,), 1 / max(count, 1) if reduction == "mean" else 1.0, dtype=wide)
    weight = valid.to(wide)
    return weight / weight.sum().clamp_min(1) if reduction == "mean" else weight
