"""The reference: where it comes from, and what it said."""
