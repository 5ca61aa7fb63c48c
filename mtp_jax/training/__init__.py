"""The train step as a pure function, and the loop around it."""
