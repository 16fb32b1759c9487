"""PatchMix's networks: queries and keys against a direct computation, the key network's steps, their state."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastret.data import ImageSet
from fastret.functional import patchmix
from fastret.training import TrainOptions
from fastret.training.patchmix import PatchMixNet
from fastret.training.sources import open_data
from fastret.training.trainer import Trainer
from fastret.training.vit import ViT

Build = Callable[..., TrainOptions]


def _net(mix: int = 2, momentum: float = 0.9) -> PatchMixNet:
    torch.manual_seed(0)
    return PatchMixNet(ViT(1, 8, 8, 2, dim=16, depth=1), mix, momentum, seed=5)


def _moved_keys(net: PatchMixNet) -> PatchMixNet:
    """With keys unlike queries, as after some steps."""
    with torch.no_grad():
        for parameter in (*net.key_backbone.parameters(), *net.key_projector.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def test_queries_and_keys_are_of_views_and_their_mixtures() -> None:
    net = _moved_keys(_net(mix=3))
    views = torch.rand(24, 1, 8, 8) * 255
    first, second = views.chunk(2)
    generator = torch.Generator().manual_seed(5)
    mixed_first, mixed_second = (patchmix(x, 2, 3, generator=generator) for x in (first, second))
    assert not torch.equal(patchmix(first, 2, 3, generator=torch.Generator().manual_seed(5)), mixed_second)
    q = nn.Sequential(net.backbone, net.projector, net.predictor)
    k = nn.Sequential(net.key_backbone, net.key_projector)
    expected = [q(first), k(first), k(second), q(mixed_second), k(mixed_first)]
    found = net.arguments(views, torch.arange(12).repeat(2))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (12, net.width)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert [one.requires_grad for one in found] == [True, False, False, True, False]


def test_judged_is_the_feature_below_the_projector() -> None:
    net, images = _net(), torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(net(images), net.backbone(images))


def test_the_key_network_follows_each_step(options: Build) -> None:
    trainer = Trainer(open_data(options().data), options(loss="patchmix", momentum=0.8, patch_size=8))
    net = trainer.model
    assert isinstance(net, PatchMixNet)
    pairs = [
        (slow, fast)
        for key, online in ((net.key_backbone, net.backbone), (net.key_projector, net.projector))
        for slow, fast in zip(key.parameters(), online.parameters(), strict=True)
    ]
    assert all(torch.equal(slow, fast) for slow, fast in pairs)
    for _ in range(2):
        before = [slow.clone() for slow, _ in pairs]
        trainer.step()
        for old, (slow, fast) in zip(before, pairs, strict=True):
            torch.testing.assert_close(slow, 0.8 * old + 0.2 * fast)
    assert not any(torch.equal(slow, fast) for slow, fast in pairs)
    learned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not learned & {id(slow) for slow, _ in pairs}
    assert learned > {id(fast) for _, fast in pairs}


def test_state_goes_on_with_the_next_permutation() -> None:
    net, views = _moved_keys(_net()), torch.rand(24, 1, 8, 8) * 255
    labels = torch.arange(12).repeat(2)
    net.arguments(views, labels)
    other = _net()
    other.load_state_dict(deepcopy(net.state_dict()))
    for one, expected in zip(other.arguments(views, labels), net.arguments(views, labels), strict=True):
        assert torch.equal(one, expected)


def test_sizes_that_do_not_fit_are_named(options: Build) -> None:
    with pytest.raises(ValueError, match="mix: expected at most the 16 patches of an image, got 17"):
        _net(mix=17)
    data = open_data(options().data)
    with pytest.raises(ValueError, match="patch_size: expected a divisor of both sides of the images, 32 x 32, got 5"):
        Trainer(data, options(loss="patchmix", patch_size=5))
    few = replace(data, train=ImageSet(data.train.images[:8], torch.arange(8), ("a",) * 8, 8))
    with pytest.raises(ValueError, match=r"mix: expected at most 4, as a batch .* the data has 8, got 5"):
        Trainer(few, options(loss="patchmix", patch_size=8, mix=5))
    Trainer(few, options(loss="patchmix", patch_size=8, mix=4))
