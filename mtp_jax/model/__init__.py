"""The decoder language model and its extra prediction heads, as pure functions over a tree of parameters."""
