"""Functions with fast paths; each has one signature and a slow obvious version that it must match."""
