"""The train step, which is a pure function, and the loop around it."""
