"""Greedy pruning of reasoning chains: which tokens a model needs, by their order of deletion (arXiv:2601.03066)."""
