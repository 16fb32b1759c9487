"""A small vision transformer: patches of an image as tokens, the mean of the last ones as its feature.

Dosovitskiy et al.: An Image is Worth 16x16 Words. ICLR 2021, arXiv 2010.11929. Positions are fixed sines and cosines of
both coordinates, and there is no class token, as Chen, Xie, He have it: An Empirical Study of Training Self-Supervised
Vision Transformers. ICCV 2021, arXiv 2104.02057.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

SLOWEST = 1e-4  # radians a patch, of the sines of positions
MLP_RATIO = 4


def sines(height: int, width: int, dim: int) -> Tensor:
    """(height * width, dim) positions: sines and cosines of the column, then of the row, dim / 4 of each.

    Raises:
        ValueError: dim is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim: expected a multiple of 4, got {dim}")
    frequencies = SLOWEST ** (torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)


class Attention(nn.Module):
    """Self-attention of (n, tokens, dim) with ``heads`` heads, which divide dim."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        query, key, value = self.qkv(x).view(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value)
        attended: Tensor = self.out(mixed.transpose(1, 2).reshape(n, tokens, dim))
        return attended


class Block(nn.Module):
    """x + attention(norm(x)), then the same with two linear layers."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(dim), Attention(dim, heads))
        hidden = MLP_RATIO * dim
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        y: Tensor = x + self.mlp(x)
        return y


class ViT(nn.Module):
    """(n, channels, height, width) images, 0 to 255, to (n, dim) features, not normalised.

    Args:
        channels: 1 for gray images, 3 for colour.
        height, width: of an image.
        patch_size: side of a patch in pixels; it divides both.
        dim: width of a token and of the feature, a multiple of 4.
        depth: blocks.
        heads: of the attention; they divide dim.

    Raises:
        ValueError: the patch does not divide the image, or the heads the width.
    """

    positions: Tensor

    def __init__(
        self, channels: int, height: int, width: int, patch_size: int, *, dim: int = 64, depth: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of both sides of the images, {height} x {width}, got {patch_size}"
            )
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of dim, {dim}, got {heads}")
        self.dim, self.patch_size = dim, patch_size
        grid = height // patch_size, width // patch_size
        self.embed = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.register_buffer("positions", sines(*grid, dim), persistent=False)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)

    @property
    def patches(self) -> int:
        return len(self.positions)

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, dim) of images (n, channels, height, width), uint8 or float from 0 to 255."""
        scaled = images.to(torch.float32) / 127.5 - 1
        tokens = self.embed(scaled).flatten(2).transpose(1, 2) + self.positions
        features: Tensor = self.norm(self.blocks(tokens)).mean(1)
        return features
