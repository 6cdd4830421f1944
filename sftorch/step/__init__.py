"""A step: a plan, which is kept while it stays right, and an ordered list of backends that run it."""
