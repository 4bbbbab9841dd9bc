"""Megatron's MoE layer, router and dispatchers with default vectors, and what a step sums up."""
