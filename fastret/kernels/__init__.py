"""Floor 1: GPU kernels. ``fastret.kernels.triton`` is the folder kernels/triton of the repository."""
