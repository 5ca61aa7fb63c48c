"""Functions of the user, each in a process that can be stopped."""
