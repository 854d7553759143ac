"""Metrics of a run, and how they are shown in the terminal, drawn and written."""
