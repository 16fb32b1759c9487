"""Floor 2: one folder per implementation, one module per op, chosen by ``registry``."""
