"""Sinkhorn attention on GPUs: kernels in Triton, and the choice among them."""
