"""From gradients to updates: the transformation, along a direction or a base, and its lean form."""
