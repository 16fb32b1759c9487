"""What ``import fastret`` alone gives."""

import fastret


def test_names() -> None:
    for name in fastret.__all__:
        assert hasattr(fastret, name), name
    assert callable(fastret.retrieval.recall_at_k)
    assert callable(fastret.functional.smooth_ap)
