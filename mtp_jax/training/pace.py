"""How far the host may run ahead of the device.

Steps are given to the device before it is done with those in front of them, so that a late batch costs nothing. What
was given must be finished before a run can stop, and a machine that is taken away leaves seconds. So steps in flight
are bounded by number and by time: of short ones as many as hide a late batch, of long ones only the one that runs.
"""

SECONDS_AHEAD = 4.0
"""Most seconds of work, beyond the step that runs, that a stop has to wait for."""


class Pace:
    """What is known about the duration of a step."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._seconds = 0.0

    def measured(self, seconds: float) -> None:
        """A step took so long: the first one, when its program was there, or the mean since the last log step."""
        self._mean = self._seconds = seconds

    def waited(self, seconds: float) -> None:
        """The host waited so long for a step, which may be slower than the mean; the next wait may be shorter again."""
        self._seconds = max(self._mean, seconds)

    def ahead(self, most: int) -> int:
        """Steps that may be unfinished when the next one is given to the device; 0 lets it finish first.

        Args:
          most: their bound, however short they are.
        """
        return most if most * self._seconds <= SECONDS_AHEAD else int(SECONDS_AHEAD / self._seconds)
