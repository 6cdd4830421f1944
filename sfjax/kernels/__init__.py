"""A step in one pass over memory on a CPU: the C of `sfcore.native`, called by XLA."""
