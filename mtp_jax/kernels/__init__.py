"""Functions with fast paths. All paths of a function have one signature, and must match a slow, obvious version."""
