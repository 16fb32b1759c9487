"""What ``import fastret`` alone gives."""

import fastret


def test_names() -> None:
    for name in fastret.__all__:
        assert hasattr(fastret, name), name
    assert callable(fastret.retrieval.recall_at_k)
    for name in fastret.functional.__all__:
        assert callable(getattr(fastret.functional, name)), name
    for name in ("MultiSimilarity", "InvariantSpreading", "SoftTriple", "SubCenterArcFace", "SoftPQ", "DPQ", "DPQLoss"):
        assert name in fastret.__all__
