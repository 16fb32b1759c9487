"""Triton kernels: one file per reduction, launched by the file of the same name in fastret/backends/triton."""
