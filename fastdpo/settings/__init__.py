"""What the user set, read and checked before anything slow is imported."""
