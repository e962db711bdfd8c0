"""Perturbation kernels, p(x_t | x_0), by kind of SDE."""
