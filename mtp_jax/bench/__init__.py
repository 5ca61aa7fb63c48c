"""What `mtp bench` and the scripts in benchmarks/ measure with: functions that return figures and print nothing."""
