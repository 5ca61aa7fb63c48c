"""Targets, the cross-entropy that never holds all logits, and the loss over heads. Arrays in, arrays out.

These modules know nothing of the model or the trainer: a training loop of your own can use them with its own hidden
states and unembedding.
"""
