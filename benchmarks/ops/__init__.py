"""One module per op that is measured; each defines ``OP``, a ``benchmarks.registry.Op``."""
