"""Runs code that a model wrote, together with its tests, in processes with limits; see `outside`."""
