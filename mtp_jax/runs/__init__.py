"""The files of a run, and the processes that train it."""
