"""Rollouts: responses of the policy, decoded by the engine from the parameters that are trained.

The parameters go to the engine as they are, with adapters added to their matrices, so nothing passes through a disk and
the engine's programs are compiled once. A prompt is run once for all its samples. Drafting changes no response
(`decode/verify.py`), so responses are those of the policy itself.

Every random choice is a function of (seed, step, prompt, sample), where prompt is its place in the step. So a step that
is repeated after a stop has the same responses.

Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): a group in which all responses are right, or all are wrong, has
no advantage. It is replaced by a group of a further prompt:

    round 0      A* B  C* D       *: some responses are right and some wrong
    round 1      E  F* G  H       refills the places of B and D
    the batch    A* C* F* B       one place is left after the last round. It keeps B, with weight 0

So the batch has the same shape in every step.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtp_jax.config import Arch, Config, LoraConfig
from mtp_jax.decode.options import Options
from mtp_jax.decode.request import Request
from mtp_jax.decode.stats import DecodeStats
from mtp_jax.loading import LoadedModel
from mtp_jax.model import lora, mtp
from mtp_jax.rl import rewards
from mtp_jax.rl.questions import Asked, number_of, taken
from mtp_jax.rl.rewards import Reward, Scored
from mtp_jax.runs.programs import bounded

ROUNDS = 32
"""Rounds of decoding between two looks for a request to stop."""

Check = Callable[[], None]
"""Is called between pieces of work. It raises if the run shall stop."""


class Sampled(NamedTuple):
    """The responses to some prompts, sample j of prompt i at i * n + j."""

    tokens: list[list[int]]
    texts: list[str]
    logprobs: list[list[float]]
    """Log-probability of every token under the policy, at the temperature of sampling and before top-p."""
    entropies: list[list[float]]
    cut: list[bool]
    """Whether a response was ended by the limit on its length."""
    stats: DecodeStats


class Group(NamedTuple):
    """The responses to one prompt, with their rewards."""

    question: Asked
    tokens: list[list[int]]
    texts: list[str]
    logprobs: list[list[float]]
    entropies: list[list[float]]
    cut: list[bool]
    scored: list[Scored]

    @property
    def mixed(self) -> bool:
        """Whether some responses are right and some are wrong."""
        right = sum(one.right for one in self.scored)
        return 0 < right < len(self.scored)


class Rolled(NamedTuple):
    """The rollouts of a step."""

    groups: list[Group]
    """The groups of the batch, `rl.prompts` of them."""
    counted: list[bool]
    """For each of these groups, whether it counts in the loss."""
    first: list[Group]
    """The groups of the first round, before any was replaced. Statistics of rewards are of these."""
    rounds: int
    """Number of rounds of further prompts."""
    stats: DecodeStats
    """Counts of decoding, over all rounds."""
    failures: dict[str, int]
    """How often the verifier failed, by reason."""
    rollout_seconds: float
    reward_seconds: float


@bounded(statics=(0, 1))
def _policy_view(arch: Arch, adapters: LoraConfig, params: Any) -> Any:
    """The decode view of the parameters of a training state."""
    return mtp.decode_view(arch, lora.merge_traced(model_params(params), adapters))


def model_params(params: Any) -> Any:
    """The parameters of a training state without those that only its objective needs. Adapters stay."""
    dropped = set(mtp.OF_TRAINING) - {"lora"}
    return {name: tree for name, tree in params.items() if name not in dropped}


def reference_params(config: Config, params: Any) -> Any:
    """Parameters of a training state in which the model is the frozen reference: the one at the start of the run. If
    only adapters and heads are trained, it is the model without adapters, and the state has no second copy."""
    if config.copies_teacher:
        return params | params[mtp.TEACHER]
    return params | {"lora": jax.tree.map(jnp.zeros_like, params["lora"])}


class Policy:
    """The model that is trained, as the engine takes it.

    Args:
      config: the run's config.
      tokenizer: the tokenizer of the run.
      mesh: the devices of the run.
    """

    def __init__(self, config: Config, tokenizer: Any, mesh: Mesh) -> None:
        self._config = config
        self.empty = LoadedModel(config, None, tokenizer, mesh)
        """The model without parameters: for prompts."""

    def model(self, params: Any) -> LoadedModel:
        """The model with the parameters of a training state, which stay usable."""
        view = _policy_view(self._config.arch, self._config.lora, params)
        return dataclasses.replace(self.empty, decode_view=view)


def sample(
    config: Config, lm: LoadedModel, prompts: Sequence[list[int]], seeds: Sequence[int], check: Check
) -> Sampled:
    """Samples responses, with the settings of `rl`.

    Args:
      config: the run's config.
      lm: from `Policy.model`.
      prompts: token ids of the prompts.
      seeds: one for each response; a multiple of the number of prompts.
      check: is called between rounds.
    """
    rl = config.rl
    drawing = {"temperature": rl.temperature, "top_p": rl.top_p if rl.top_p < 1 else None, "seed": list(seeds)}
    options = Options(logprobs=0, logprobs_tempered=rl.temperature != 1, **drawing)
    return _decode(config, lm, prompts, len(seeds) // len(prompts), options, check)


def greedy(config: Config, lm: LoadedModel, prompts: Sequence[list[int]], check: Check) -> Sampled:
    """The most likely response to each prompt, token by token. The arguments are those of `sample`."""
    return _decode(config, lm, prompts, 1, Options(logprobs=0), check)


def _decode(
    config: Config, lm: LoadedModel, prompts: Sequence[list[int]], n: int, options: Options, check: Check
) -> Sampled:
    num_draft = None if config.decode.num_draft < 0 else config.decode.num_draft
    settings = (config.rl.max_new_tokens, config.rl.draft, num_draft if config.rl.draft != "none" else None)
    request = Request(lm, prompts, *settings, options, (), ignore_eos=False, n=n)
    while not request.done:
        check()
        request.advance(ROUNDS)
    made = request.result()
    cut = [reason == "length" for reason in made.finish_reason]
    return Sampled(made.tokens, made.text, made.logprobs, made.entropies, cut, made.stats)


class _Round(NamedTuple):
    """The groups of one round of prompts."""

    groups: list[Group]
    stats: DecodeStats
    rollout_seconds: float
    reward_seconds: float


class Rollouts:
    """Makes the rollouts of every step.

    Args:
      config: the run's config.
      questions: the questions that the run learns from.
      reward: the verifier.
      check: is called between pieces of work.
    """

    def __init__(self, config: Config, questions: Sequence[Asked], reward: Reward, check: Check) -> None:
        self._config = config
        self._questions = questions
        self._reward = reward
        self._check = check

    def of_step(self, lm: LoadedModel, step: int) -> Rolled:
        """The rollouts of a step.

        Args:
          lm: from `Policy.model`.
          step: number of steps before this one.
        """
        rl = self._config.rl
        rounds = [self._round(lm, step, 0)]
        groups = rounds[0].groups
        counted = [True] * len(groups)
        if rl.refills:
            mixed = [group for group in groups if group.mixed]
            spare = [group for group in groups if not group.mixed]
            while len(mixed) < rl.prompts and len(rounds) <= rl.refills:
                rounds.append(self._round(lm, step, len(rounds)))
                mixed += [group for group in rounds[-1].groups if group.mixed]
            groups = (mixed + spare)[: rl.prompts]
            counted = [group.mixed for group in groups]
        scored = [one for made in rounds for group in made.groups for one in group.scored]
        return Rolled(
            groups,
            counted,
            rounds[0].groups,
            len(rounds) - 1,
            added([made.stats for made in rounds]),
            rewards.failures(scored),
            sum(made.rollout_seconds for made in rounds),
            sum(made.reward_seconds for made in rounds),
        )

    def _round(self, lm: LoadedModel, step: int, number: int) -> _Round:
        """One round of prompts: round 0 of a step, or a refill."""
        rl = self._config.rl
        seed = self._config.train.seed
        began = time.perf_counter()
        first = (step * rl.refills + number - 1) if number else step
        stream = "refills" if number else "prompts"
        asked = taken(self._questions, seed, stream, first * rl.prompts, rl.prompts)
        places = range(number * rl.prompts, (number + 1) * rl.prompts)
        seeds = [number_of(seed, step, place, sample) for place in places for sample in range(rl.samples)]
        made = sample(self._config, lm, [one.ids for one in asked], seeds, self._check)
        decoded = time.perf_counter()
        records = [one.record for one in asked for _ in range(rl.samples)]
        scored = rewards.score(self._reward, made.texts, records)
        self._check()
        groups = []
        for place, question in enumerate(asked):
            rows = slice(place * rl.samples, (place + 1) * rl.samples)
            lists = (made.tokens, made.texts, made.logprobs, made.entropies, made.cut, scored)
            groups.append(Group(question, *(values[rows] for values in lists)))
        return _Round(groups, made.stats, decoded - began, time.perf_counter() - decoded)


def added(parts: Sequence[DecodeStats]) -> DecodeStats:
    """The counts of several requests together."""

    def total(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return tuple(map(sum, zip(*values, strict=True))) if isinstance(values[0], tuple) else sum(values)

    names = [field.name for field in dataclasses.fields(DecodeStats) if field.name != "lossy"]
    return DecodeStats(**{name: total(name) for name in names}, lossy=any(part.lossy for part in parts))
