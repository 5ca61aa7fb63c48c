"""Ahead-of-time compilation: compiles the real programs of a run for other devices, and reads whether they fit."""
