"""A run on disk, and its processes."""
