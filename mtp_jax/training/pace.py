"""Decides how far the host may run ahead of the device.

The host gives steps to the device before earlier steps are finished, so that a late batch costs no time. But all these
steps must finish before a run can stop, and a machine that is taken away gives only seconds of warning. So the
unfinished steps are limited in number and in time. If steps are short, there are enough to hide a late batch. If they
are long, only the running step is unfinished.
"""

SECONDS_AHEAD = 4.0
"""Limit in seconds for the work that a stop must wait for, in addition to the running step."""


class Pace:
    """Estimates the duration of a step, and limits the number of unfinished steps."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._seconds = 0.0

    def measured(self, seconds: float) -> None:
        """Takes a measured duration: that of the first step after compilation, or the mean since the last log step."""
        self._mean = seconds
        self._seconds = seconds

    def waited(self, seconds: float) -> None:
        """Takes the time that the host waited for a step. Counts if it is longer than the mean, until the next wait."""
        self._seconds = max(self._mean, seconds)

    def ahead(self, most: int) -> int:
        """Number of steps that may be unfinished when the next one is given to the device. At 0, all must be finished.

        Args:
          most: upper limit, also for short steps.
        """
        return most if most * self._seconds <= SECONDS_AHEAD else int(SECONDS_AHEAD / self._seconds)
