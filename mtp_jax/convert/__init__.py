"""Hugging Face checkpoints, and heads in the forms they come in, to our parameters and back."""
