"""The user's settings, read and checked before any slow module is imported."""
