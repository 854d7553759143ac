"""What is measured of a run, shown in the terminal, drawn and written."""
