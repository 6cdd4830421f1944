"""Frozen checkpoints and the program that made them."""
