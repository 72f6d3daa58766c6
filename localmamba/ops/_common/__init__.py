"""Shared by the operators: registration of custom ops, choice of kernels, CPU and GPU helpers."""
