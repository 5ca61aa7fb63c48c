"""What a trained model is worth: held-out loss by head, acceptance, speed, and a report."""
