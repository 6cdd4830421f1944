"""What a user passes in, what the state is, and what it tells; nothing here takes a step."""
