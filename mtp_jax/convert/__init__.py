"""Converts Hugging Face checkpoints, and heads in the forms of other projects, to our parameters and back."""
