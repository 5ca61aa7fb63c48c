"""Measurements for `mtp bench` and the scripts in benchmarks/. The functions return numbers and print nothing."""
