"""Whether a run fits onto devices that are not here: its real programs, compiled for them and read."""
