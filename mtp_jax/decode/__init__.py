"""Draft with the heads, verify with the model: one jitted program with fixed shapes."""
