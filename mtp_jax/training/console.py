"""The output of a run on standard error: a progress bar in a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunConsole:
    """Shows the progress of a training run. Use it as a context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._total = 0
        self._step = 0
        self._time = 0.0

    def note(self, text: str) -> None:
        """Prints a line that stays above the bar."""
        self._console.print(text, markup=False)

    def start(self, total: int, done: int) -> None:
        """Opens the bar for steps done..total."""
        self._total = total
        self._step = done
        self._time = time.monotonic()
        if self._console.is_terminal:
            columns = (
                *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
                *(TextColumn("{task.fields[status]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
            )
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("train", total=total, completed=done, status="")
            self._progress.start()

    def update(self, step: int, head_losses: list[float], costs: Mapping[str, float]) -> None:
        """Moves the bar, or prints a line if there is no terminal. `costs` come from `Meter.read`."""
        self.show(step, "  ".join([f"loss by head {' '.join(map(_number, head_losses))}", *_shown(costs)]))

    def show(self, step: int, status: str) -> None:
        """Moves the bar to a step, or prints a line if there is no terminal."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, status=status)
            return
        now = time.monotonic()
        # Only the steps since the last line count, because the first step had to wait for the compiler.
        left = (now - self._time) / max(step - self._step, 1) * (self._total - step)
        self._step = step
        self._time = now
        self.note(f"step {step}/{self._total}  {status}  {left:.0f} s left")

    def stop(self) -> None:
        """Closes the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> "RunConsole":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def _number(loss: float) -> str:
    """The loss as text; a dash if it was not measured."""
    return "-" if math.isnan(loss) else f"{loss:.3f}"


def _shown(costs: Mapping[str, float]) -> list[str]:
    """The costs that are shown in a line of progress."""
    parts = {
        "tokens_per_second": lambda speed: f"{speed:,.0f} tokens/s",
        "mfu": lambda share: f"MFU {share:.1%}",
        "device_peak_bytes": lambda most: f"{most / 2**30:.1f} GiB",
        "compile_seconds": lambda seconds: f"compiled in {seconds:.1f} s",
    }
    return [show(costs[name]) for name, show in parts.items() if name in costs]
