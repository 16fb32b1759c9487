"""PatchMix's networks: one that is trained, and a slowly following copy of it that gives the keys.

Shen, Liu, Tang, Qu, Wang: Inter-Instance Similarity Modeling for Contrastive Learning. arXiv 2306.12243, on the two
networks of MoCo v3 (arXiv 2104.02057). Of two views x1, x2 of each image and M(), which mixes their patches over the
batch, each call with a permutation of its own:

    queries  predictor(online(x1)), predictor(online(M x2))
    keys     key(x1), key(x2), key(M x1), without gradient
    after each step of the optimizer   key <- momentum key + (1 - momentum) online

What is judged is the feature below the projector. No crops.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fastret.functional import patchmix
from fastret.training.model import Network
from fastret.training.vit import ViT

HIDDEN = 256
WIDTH = 128  # of queries and keys


def _mlp(features: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, HIDDEN, bias=False),
        nn.BatchNorm1d(HIDDEN),
        nn.ReLU(inplace=True),
        nn.Linear(HIDDEN, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )


class PatchMixNet(Network):
    """Queries and keys of two views and their mixtures.

    Args:
        backbone: gives the feature.
        mix: m, images mixed into each, at most as many as an image has patches.
        momentum: of the key network, from 0 to 1.
        seed: of the permutations; their state is in the state_dict.

    Raises:
        ValueError: more images to mix than patches.
    """

    def __init__(self, backbone: ViT, mix: int, momentum: float, seed: int) -> None:
        super().__init__()
        if mix > backbone.patches:
            raise ValueError(f"mix: expected at most the {backbone.patches} patches of an image, got {mix}")
        self.width = WIDTH
        self.backbone, self.projector, self.predictor = backbone, _mlp(backbone.dim, WIDTH), _mlp(WIDTH, WIDTH)
        self.key_backbone = deepcopy(backbone).requires_grad_(False)
        self.key_projector = deepcopy(self.projector).requires_grad_(False)
        self.mix, self.momentum = mix, momentum
        self.permutations = torch.Generator().manual_seed(seed)

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, dim) of images (n, c, h, w)."""
        features: Tensor = self.backbone(images)
        return features

    def arguments(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """As `fastret.PatchMixLoss` takes them, of ``images`` [view 1; view 2]."""
        first, second = images.chunk(2)
        mixed_first, mixed_second = self._mixed(first), self._mixed(second)
        # The backbone takes all at once; BatchNorms take one kind of images after another, each with its statistics.
        features = self.backbone(torch.cat([first, mixed_second])).chunk(2)
        q1, mixed_q2 = (self.predictor(self.projector(part)) for part in features)
        with torch.no_grad():
            features = self.key_backbone(torch.cat([first, second, mixed_first])).chunk(3)
            k1, k2, mixed_k1 = (self.key_projector(part) for part in features)
        return q1, k1, k2, mixed_q2, mixed_k1

    @torch.no_grad()
    def after_step(self) -> None:
        """Let the key network follow."""
        for key, online in ((self.key_backbone, self.backbone), (self.key_projector, self.projector)):
            for slow, fast in zip(key.parameters(), online.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.momentum)

    def get_extra_state(self) -> dict[str, Any]:
        return {"permutations": self.permutations.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.permutations.set_state(state["permutations"])

    def _mixed(self, images: Tensor) -> Tensor:
        return patchmix(images, self.backbone.patch_size, self.mix, generator=self.permutations)
