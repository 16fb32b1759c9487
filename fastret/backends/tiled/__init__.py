"""PyTorch in tiles, on any device: bounded memory where no compiled kernel serves the call."""


def missing() -> None:
    """It needs nothing but PyTorch."""
