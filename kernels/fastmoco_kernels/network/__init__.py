"""Triton kernels for the layers of the encoder, in channels-last memory."""
