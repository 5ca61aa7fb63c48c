"""Targets, a cross-entropy that never holds all logits, and the loss over heads. Arrays in, arrays out.

These modules know nothing of the model or the trainer. You can use them in another training loop, with its hidden
states and unembedding.
"""
