"""The definitions, dense and readable, in any float dtype; PyTorch differentiates them, twice if asked."""


def missing() -> None:
    """It needs nothing but PyTorch."""
