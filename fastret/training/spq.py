"""Self-supervised product quantization: a network and a codebook learn from two random views of each image.

Jang, Cho: Self-supervised Product Quantization for Deep Unsupervised Image Retrieval. ICCV 2021, arXiv 2109.02244. The
network's descriptors x of both views and their soft quantisations z are compared across: an image's x of one view is to
be nearest its z of the other (`fastret.CQCLoss`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastret.losses import CQCLoss, SoftPQ
from fastret.training.evaluation import embed
from fastret.training.model import learn_norms

BITS = (16, 32, 64)
WORDS = 256  # of a book: a byte an index
BITS_A_BOOK = 8
TAU_Q = 1.0  # a coordinate of an embedding has unit variance


class SPQ(nn.Module):
    """Loss of the views' embeddings ``[view 1; view 2]``, with the codebook as its parameter.

    Args:
        bits: of an image's code, 8 a book.
        width: of an embedding; the books divide it.
        temperature: of the contrast.
        impl: as the losses' ``impl=``.
    """

    def __init__(self, bits: int, width: int, temperature: float, *, impl: str | None = None) -> None:
        super().__init__()
        books = bits // BITS_A_BOOK
        self.quantizer = SoftPQ(books, WORDS, width // books, TAU_Q, impl=impl)
        self.contrast = CQCLoss(tau_cqc=temperature, impl=impl)

    def forward(self, views: Tensor, labels: Tensor) -> Tensor:
        """Loss of ``views`` (2n, width), rows i and i + n of one image; labels say no more."""
        first, second = views.chunk(2)
        first_words, second_words = self.quantizer(views).chunk(2)
        loss: Tensor = self.contrast(first, second, first_words, second_words)
        return loss

    @torch.no_grad()
    def initialise(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        """Put the words where the untrained network's embeddings of all ``images``, in batches, lie, by k-means.

        Its BatchNorms learn the statistics of the images first; else embeddings would be far from all words.

        Raises:
            ValueError: fewer images than words.
        """
        count = sum(map(len, images))
        if count < WORDS:
            raise ValueError(f"data: expected at least {WORDS} images to train on, one a word of a book, got {count}")
        device = str(next(model.parameters()).device)
        learn_norms(model, images)
        self.quantizer.init_from(torch.cat([embed(model, batch, device) for batch in images]))
