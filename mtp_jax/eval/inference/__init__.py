"""Inference compute compared: sampling, voting, choosing, revising and cutting, with the tokens that each costs.

After "Think Deep, Think Fast" (arXiv:2504.14047): methods without a trained verifier, by accuracy and tokens.
"""
