"""Labelled image sets and batches for the quickstart, the examples and the benchmarks.

`load_glyphs` needs nothing but the installed package; `load_folder` reads a directory of the reader's own
images. Both return an `ImageSet`, whose training and held-out classes are disjoint, because retrieval is
evaluated on classes that were never trained on. `load_fashion_mnist` reads Debian's copy, `load_idx` any pair of
files in MNIST's format. `ClassBalancedBatches` draws batches as Smooth-AP expects them.
"""

from fastret.data.folder import load_folder
from fastret.data.glyphs import load_glyphs
from fastret.data.idx import load_fashion_mnist, load_idx, read_idx
from fastret.data.image_set import ImageSet
from fastret.data.sampler import ClassBalancedBatches

__all__ = [
    "ClassBalancedBatches",
    "ImageSet",
    "load_fashion_mnist",
    "load_folder",
    "load_glyphs",
    "load_idx",
    "read_idx",
]
