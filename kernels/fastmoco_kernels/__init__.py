"""Fused operations of MoCo as torch custom ops: Triton for CUDA, ATen for the CPU."""
