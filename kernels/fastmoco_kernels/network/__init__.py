"""Kernels for the layers of the encoder, in channels-last memory: Triton, and batch norm in C++."""
