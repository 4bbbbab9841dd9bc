"""Planted experts: a task with a known answer, in which the router's gradient provably matters."""
