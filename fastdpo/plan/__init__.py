"""What a run will need, counted and computed before it starts."""
