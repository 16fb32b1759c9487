"""PatchMixer: images of fastret.functional.patchmix, labels of the released code."""

from typing import Any

import pytest
import torch

import fastret
from fastret import PatchMixer, PatchMixTargets

B, C, SIDE = 7, 12, 8


def images() -> torch.Tensor:
    return torch.randn(B, 3, SIDE, SIDE)


def seeded(**options: Any) -> PatchMixer:
    return PatchMixer(
        C, **{"mix_s": 2, "mix_n": 3, "mix_p": 1.0, "generator": torch.Generator().manual_seed(5), **options}
    )


def test_images_and_dense_targets() -> None:
    x = images()
    before = x.clone()
    mixed, to_origin, to_mix = seeded(smoothing=0.25, offset=4)(x, torch.arange(B))
    assert torch.equal(x, before)
    shifts = set()
    for b in range(B):
        for row in range(0, SIDE, 2):
            for column in range(0, SIDE, 2):
                patch = mixed[b, :, row : row + 2, column : column + 2]
                found = [j for j in range(B) if torch.equal(x[j, :, row : row + 2, column : column + 2], patch)]
                assert len(found) == 1
                shifts.add((found[0] - b) % B)
    assert shifts == {0, 1, 2}
    for b in range(B):
        for column in range(C):
            d = (column - 4 - b) % B if 4 <= column < 4 + B else None
            share = 1 / 3 if d is not None and d < 3 else 0.0
            assert to_origin[b, column] == pytest.approx(0.75 * share + 0.25 / C)
            distance = None if d is None else min(d, B - d)
            share = (1 - distance / 3) / 3 if distance is not None and distance < 3 else 0.0
            assert to_mix[b, column] == pytest.approx(0.75 * share + 0.25 / C)


def test_descriptors_are_the_dense_targets() -> None:
    x = images()
    described, dense = seeded(dense=False)(x), seeded()(x)
    assert torch.equal(described[0], dense[0])
    for mine, matrix in zip(described[1:], dense[1:], strict=True):
        assert isinstance(mine, PatchMixTargets)
        torch.testing.assert_close(mine.dense().float(), matrix)
    loss = fastret.SoftTargetInfoNCE()
    q, k = torch.randn(B, 5), torch.randn(C, 5)
    torch.testing.assert_close(loss(q, k, described[1]), loss(q, k, dense[1]))


@pytest.mark.parametrize("options", [{"mix_p": 0.0}, {"mix_n": 1}])
def test_a_batch_that_is_not_mixed(options: dict[str, Any]) -> None:
    x, target = images(), torch.tensor([3, 1, 4, 1, 5, 9, 11])
    same, first, second = seeded(**options)(x, target)
    assert same is x
    expected = 0.9 * torch.nn.functional.one_hot(target, C).float() + 0.1 / C
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)
    torch.testing.assert_close(
        seeded(**options, offset=2)(x)[1], 0.9 * torch.eye(B + 2, C)[2:] + 0.1 / C
    )  # its own images
    assert seeded(**options, dense=False)(x)[1] == PatchMixTargets("origin", B, 1, 0.1, 0, C)


def test_draws() -> None:
    x = torch.randn(9, 1, SIDE, SIDE)
    mixer = PatchMixer(9, [2, 4], (2, 3), 0.5, dense=False, generator=torch.Generator().manual_seed(1))
    kinds = [mixer(x)[2] for _ in range(200)]
    ms = [kind.m for kind in kinds if isinstance(kind, PatchMixTargets) and kind.kind == "mix-to-mix"]
    assert 70 < len(ms) < 130
    assert 20 < ms.count(2) < len(ms) - 20
    assert set(ms) == {2, 3}
    again = PatchMixer(9, [2, 4], (2, 3), 0.5, dense=False, generator=torch.Generator().manual_seed(1))
    assert [again(x)[2] for _ in range(200)] == kinds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix_p": 1.5}, "mix_p: expected a probability from 0 to 1, got 1.5"),
        ({"mix_n": 0}, "mix_n: expected at least 1, got 0"),
        ({"mix_n": []}, "mix_n: expected a number or several, got none"),
        ({"mix_s": 3}, "x: expected height and width that patches of 3 divide, got 8 x 8"),
        ({"mix_n": 5}, "batch: expected at least 2m - 1 = 9 rows"),
        ({"mix_n": 17}, "m: expected at most the 16 patches"),
        ({"smoothing": -0.1}, "smoothing: expected a number from 0 to 1, got -0.1"),
        ({"offset": 6}, "columns: expected at least offset"),
        ({"mix_p": 0.0, "target": torch.full((B,), C)}, "target: "),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    target = options.pop("target", None)
    with pytest.raises(ValueError, match=message):
        seeded(**options)(images(), target)
