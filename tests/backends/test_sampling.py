"""Columns drawn by a counter-based generator: known answers, the same wherever they are asked for, uniform."""

import pytest
import torch

from fastret.backends.sampling import Draws, philox

WORD = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the published answers of Random123's philox4x32 with 10 rounds
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    assert tuple(int(w) for w in philox(tuple(torch.tensor(c) for c in counter), torch.tensor(key))) == words


def test_pieces_are_what_the_whole_is() -> None:
    draws = Draws(23, torch.tensor(7))
    whole = draws.columns(9, 1000)
    assert whole.shape == (9, 23)
    for begin, end in ((0, 5), (3, 4), (4, 8), (7, 23)):
        assert torch.equal(draws.columns(9, 1000, begin, end), whole[:, begin:end])
    assert torch.equal(draws.of_rows(4).of_rows(1).columns(4, 1000), whole[5:])
    assert not torch.equal(Draws(23, torch.tensor(8)).columns(9, 1000), whole)
    assert not torch.equal(Draws(23, torch.tensor(7 + 2**40)).columns(9, 1000), whole)  # all 64 bits count


@pytest.mark.parametrize("size", [1, 2, 10, 97])
def test_uniform_with_replacement(size: int) -> None:
    drawn = Draws(2000, torch.tensor(3)).columns(200, size)
    counts = drawn.flatten().bincount(minlength=size).double()
    assert len(counts) == size
    expected = drawn.numel() / size
    assert (counts - expected).square().sum() / expected < size - 1 + 5 * max(1, size) ** 0.5  # chi^2, five deviations
    # rows are independent: two of them meet as often as two draws do
    if size > 2:
        meetings = (drawn[::2] == drawn[1::2]).double().mean()
        assert abs(meetings - 1 / size) < 5 * (1 / size / (drawn.numel() / 2)) ** 0.5


def test_the_largest_bank() -> None:
    drawn = Draws(1000, torch.tensor(5)).columns(100, 2**31)
    assert drawn.min() >= 0
    assert drawn.max() < 2**31
    assert drawn.max() > 2**31 - 2**17
