"""Evaluation of a trained model: held-out loss by head, acceptance, speed, and a report."""
