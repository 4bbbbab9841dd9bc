"""The formulas: pure functions of tensors, and the same as loops in float64."""
