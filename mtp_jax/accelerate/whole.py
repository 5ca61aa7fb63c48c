"""`mtp accelerate` as a function: heads for a checkpoint, and the page about them."""

import pathlib
from typing import NamedTuple

from mtp_jax.accelerate import report
from mtp_jax.accelerate.batches import Say
from mtp_jax.accelerate.plan import HeadTraining
from mtp_jax.accelerate.stages import Outcome, accelerate
from mtp_jax.runs.progress import say
from mtp_jax.training.start import config_of


class Accelerated(NamedTuple):
    """The result of `train_heads`."""

    outcome: Outcome
    page: pathlib.Path | None
    """The report; None if training was stopped."""

    @property
    def heads(self) -> pathlib.Path:
        """Workdir of the model with its heads, for `mtp_jax.load`."""
        return self.outcome.heads

    @property
    def finished(self) -> bool:
        """Whether all stages ended. If not, the same call continues."""
        return self.page is not None


def train_heads(
    source: str, workdir: str | pathlib.Path, settings: HeadTraining | None = None, notify: Say = say
) -> Accelerated:
    """Trains heads that draft for a model, on the model's own answers. Then measures them and writes a page.

        fast = mtp_jax.train_heads("smollm2", "runs/fast", mtp_jax.HeadTraining(minutes=30))
        lm = mtp_jax.load(fast.heads)

    The model does not change. A call that was stopped continues where it stopped.

    Args:
      source: the model, as `load` takes it.
      workdir: directory for all results.
      settings: the settings of the run.
      notify: is called with a line of text about the progress.

    Raises:
      UserError: the source has no tokenizer, the workdir belongs to another run, or a stage refuses its input.
    """
    workdir = pathlib.Path(workdir)
    outcome = accelerate(source, workdir, settings or HeadTraining(), notify)
    if outcome.results is None:
        return Accelerated(outcome, None)
    heads = config_of(outcome.heads).heads
    facts = {
        "heads": f"{heads.num_future - 1} {heads.kind}, over {heads.draft_vocab:,} tokens",
        "training steps": f"{outcome.training.step:,}",
        "learned from": outcome.training.corpus.description,
    }
    return Accelerated(outcome, report.write_report(workdir / "report", source, outcome.heads, outcome.results, facts))
