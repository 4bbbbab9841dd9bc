"""Megatron's training loop on a machine without a GPU: what is replaced, which flags go with it."""
