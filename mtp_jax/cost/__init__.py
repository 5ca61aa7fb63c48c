"""What a model costs: operations, and what a machine can do."""
