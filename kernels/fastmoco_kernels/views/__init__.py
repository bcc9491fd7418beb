"""Triton kernels for the views of the augmentation, on uint8 RGB pixels."""
