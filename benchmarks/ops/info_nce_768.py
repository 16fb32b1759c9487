"""InfoNCE of rows of D = 768, where the products outweigh the exponentials; all else as in info_nce."""

from benchmarks.ops.info_nce import op

OP = op("info_nce_768", __name__, sizes=(1024, 8192), d=768)
