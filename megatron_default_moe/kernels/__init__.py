"""The same maths as fused Triton kernels, for NVIDIA devices."""
