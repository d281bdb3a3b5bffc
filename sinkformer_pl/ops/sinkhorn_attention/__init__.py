"""Sinkhorn attention: the plan of the half-steps times the values, on the CPU and on GPUs."""
