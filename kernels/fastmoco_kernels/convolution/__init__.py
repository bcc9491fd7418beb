"""Convolutions in C++ for the CPU: weight gradients in bf16, all three products in fp32."""
