"""How the values of anchors become a loss: one vocabulary for every loss."""

from torch import Tensor, nn

from fastret.backends.rows import accumulation_dtype

REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def reduce_valid(values: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Mean over valid anchors (0, connected to the graph, where there are none), sum, or (N,) with 0 where invalid."""
    values = values * valid  # not a selection: NaN stays visible, and nothing waits for the device
    if reduction == "none":
        return values
    total = values.sum()
    return total / valid.sum().clamp_min(1) if reduction == "mean" else total


def log1p_exp(z: Tensor) -> Tensor:
    """log(1 + e^z): of z = a log-sum-exp, the same with one more logit, 0; 0 without a slope at -inf."""
    return nn.functional.softplus(z, threshold=40)  # the default takes z beyond 20: 2e-9 off in float64


def row_weights(rows: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    """(N,) constants whose weighted sum of row losses is "mean" over valid rows, or "sum"."""
    weight = rows.new_ones(rows.shape[0], dtype=accumulation_dtype(rows.dtype))
    if valid is not None:
        weight = weight * valid
    return weight / weight.sum().clamp_min(1) if reduction == "mean" else weight
