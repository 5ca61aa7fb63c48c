"""Proxy-tuning: a large model is steered by the difference of two small ones (Liu et al. 2024, arXiv:2401.08565).

    logits = base + alpha * (expert - anti-expert)

The expert is a tuned model, the anti-expert is the same model before tuning, and the base is the model that is decoded.
The three run in one program, each with its own caches. The sampler and the accept rule use the combined logits. So
drafts of any drafter leave the combined distribution as it is.
"""

import dataclasses
import numbers
import reprlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Arch
from mtp_jax.decode.drafters import Drafter
from mtp_jax.decode.hooks import Asked, Hook, HookContext, HookMaker
from mtp_jax.decode.prompts import Prompt, is_conversation, prompt_ids
from mtp_jax.decode.second_model import SecondModel, model_drafter, second_model
from mtp_jax.errors import UserError
from mtp_jax.model import mtp, trunk
from mtp_jax.model.token_rows import token_rows
from mtp_jax.runs.integrity import short_reason
from mtp_jax.runs.programs import bounded

ReadsAs = Callable[[Prompt], Prompt]
SIDES = ("expert", "anti_expert")
LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, eq=False)
class ProxyTuning(HookMaker):
    """Steers the decoded model by the difference of an expert and an anti-expert.

    proxy = ProxyTuning(expert, anti_expert)
    generate(base, prompts, max_new_tokens=64, hooks=[proxy])

    A prompt of messages is written by each model's own chat template. All three models read the same tokens of any
    other prompt, unless `expert_reads` or `anti_expert_reads` says otherwise.
    """

    expert: Any
    """The tuned model, from `load`. It has the vocabulary of the base."""
    anti_expert: Any
    """The same model before tuning, from `load`."""
    alpha: float = 1.0
    """Factor of the difference. 0 is the base alone."""
    expert_reads: ReadsAs | None = None
    """What the expert reads in the place of a prompt of the base: a function from prompt to prompt. `as_message` makes
    a text the message of a user, as the paper does for a chat model. The new tokens follow in all models."""
    anti_expert_reads: ReadsAs | None = None
    """The same for the anti-expert."""

    def __post_init__(self) -> None:
        is_number = isinstance(self.alpha, numbers.Real) and not isinstance(self.alpha, bool)
        if not is_number or not abs(self.alpha) <= LARGEST:
            raise UserError(f"ProxyTuning.alpha={self.alpha!r}; it must be a finite number of float32, such as 1.0")
        for side in SIDES:
            lm = getattr(self, side)
            _check_loaded(f"ProxyTuning.{side}", lm)
            if lm.answers_in_one_pass:
                raise UserError(
                    f"ProxyTuning.{side} was trained with loss.teacherless and answers in one pass; use a model that "
                    "continues a text"
                )
            reads = getattr(self, f"{side}_reads")
            if reads is not None and not callable(reads):
                raise UserError(f"ProxyTuning.{side}_reads={reads!r}; it must be a function from prompt to prompt")

    def hook(self, asked: Asked) -> Hook:
        """The hook for a request. Other models of the same shapes, and another alpha, use the same programs."""
        statics = {}
        params = {"alpha": np.float32(self.alpha)}
        for side in SIDES:
            lm = getattr(self, side)
            check_vocabulary(asked.lm, lm, side)
            own = self._ids(side, asked)
            statics[side], params[side] = second_model(lm, own, asked.ids, asked.rows)
        models = statics["expert"], statics["anti_expert"]
        begin = _Begin(*models) if any(model.more for model in models) else None
        return Hook("proxy tuning", _Init(*models), _Apply(*models), params=params, begin=begin)

    def drafter(self, num_draft: int = 4) -> Drafter:
        """The expert as a drafter: `generate(..., draft=proxy.drafter(), hooks=[proxy])`.

        It drafts token by token and reads the prompts of the base. It has caches in addition to those of the hook.

        Args:
          num_draft: P, drafts per round.
        """
        return model_drafter("expert", self.expert, num_draft)

    def combined_logits(self, base: Any, tokens_BT: Any) -> jax.Array:
        """Float32 logits [B, T, V] of the combination at every position of whole rows, for example as a teacher.

        All models read the same tokens.

        Args:
          base: the model that is steered.
          tokens_BT: token ids; every row is one document.

        Raises:
          UserError: the base is no model, the vocabularies differ, the tokens are not in rows, or a model only decodes.
        """
        _check_loaded("combined_logits: base", base)
        for side in SIDES:
            check_vocabulary(base, getattr(self, side), side)
        models = (base, self.expert, self.anti_expert)
        shared = min(lm.arch.model.vocab_size for lm in models)
        rows_BT = jax.device_put(token_rows("combined_logits", tokens_BT, shared))
        params = tuple(mtp.trunk_params(lm.stacked_params()) for lm in models)
        return _combined_rows(tuple(lm.arch for lm in models), params, jnp.float32(self.alpha), rows_BT)

    def _ids(self, side: str, asked: Asked) -> list[list[int]]:
        """The prompts of the expert or the anti-expert, as tokens."""
        lm = getattr(self, side)
        longest = lm.arch.model.max_seq_len
        own = []
        for row, (prompt, base_ids) in enumerate(zip(asked.prompts, asked.ids, strict=True)):
            read = self._read(side, prompt, base_ids, row)
            try:
                ids = prompt_ids(lm, read, row)
            except UserError as error:
                raise UserError(f"ProxyTuning.{side}: {error}") from error
            needed = len(ids) + asked.limits[row] - len(base_ids)
            if needed > longest:
                raise UserError(
                    f"ProxyTuning.{side}: prompt {row} with its new tokens needs {needed} positions, but "
                    f"model.max_seq_len={longest} of this model; use a smaller max_new_tokens"
                )
            own.append(ids)
        return own

    def _read(self, side: str, prompt: Prompt, base_ids: list[int], row: int) -> Prompt:
        """What the expert or the anti-expert reads in the place of a prompt."""
        reads = getattr(self, f"{side}_reads")
        if reads is None:
            return prompt if is_conversation(prompt) else base_ids
        try:
            return reads(prompt)
        except Exception as error:
            reason = f"{type(error).__name__}: {short_reason(error)}"
            raise UserError(
                f"ProxyTuning.{side}_reads={reads!r} fails on prompt {row} ({reason}); it must be a function from "
                "prompt to prompt"
            ) from error


def _check_loaded(name: str, lm: Any) -> None:
    """Refuses what `load` has not returned."""
    if not hasattr(lm, "decode_params"):
        raise UserError(f"{name}={reprlib.repr(lm)} is no loaded model; give mtp_jax.load(SOURCE)")


def as_message(prompt: Prompt) -> Prompt:
    """A text as the message of a user, for `ProxyTuning.expert_reads`. Other prompts are returned unchanged."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def combine_logits(base: jax.Array, expert: jax.Array, anti_expert: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """base + alpha (expert - anti-expert), in float32.

    Args:
      base: logits [..., V].
      expert: logits [..., V]. The tables of two models with one tokenizer may be padded to different sizes.
      anti_expert: logits [..., V].
      alpha: factor of the difference.

    Returns:
      [..., V] of the base. Tokens that a model does not have get -inf.
    """
    V = min(base.shape[-1], expert.shape[-1], anti_expert.shape[-1])
    base_V, expert_V, anti_V = (logits[..., :V].astype(jnp.float32) for logits in (base, expert, anti_expert))
    known = base_V + alpha * (expert_V - anti_V)
    unknown = [(0, 0)] * (base.ndim - 1) + [(0, base.shape[-1] - V)]
    return jnp.pad(known, unknown, constant_values=-jnp.inf)


def check_vocabulary(base: Any, other: Any, side: str) -> None:
    """Refuses a model with other tokens than the base has.

    Tables may have different sizes if there are tokenizers that agree: some models pad their tables.

    Args:
      base: the model that is decoded.
      other: the expert or the anti-expert.
      side: its name, for the error.
    """
    sizes = base.arch.model.vocab_size, other.arch.model.vocab_size
    V = min(sizes)
    if base.tokenizer is None or other.tokenizer is None:
        if sizes[0] != sizes[1]:
            raise UserError(
                f"ProxyTuning.{side} has {sizes[1]} tokens, but the base has {sizes[0]}; use models of one vocabulary"
            )
        return
    if base.tokenizer is other.tokenizer:
        return
    one = base.tokenizer.beyond(0)
    two = other.tokenizer.beyond(0)
    unlike = [token for token in one.keys() & two.keys() if token < V and one[token] != two[token]]
    if unlike:
        token = min(unlike)
        raise UserError(
            f"ProxyTuning.{side} has another vocabulary: its token {token} is {two[token]!r}, but that of the base is "
            f"{one[token]!r}; use models of one vocabulary"
        )


@dataclasses.dataclass(frozen=True)
class _Init:
    expert: SecondModel
    anti_expert: SecondModel

    def __call__(self, arch: Arch, batch: int, slots: int) -> tuple[Any, Any]:
        return self.expert.init(batch, slots), self.anti_expert.init(batch, slots)


@dataclasses.dataclass(frozen=True)
class _Begin:
    expert: SecondModel
    anti_expert: SecondModel

    def __call__(self, params: Any, cache: tuple[Any, Any]) -> tuple[Any, Any]:
        return self.expert.begin(params["expert"], cache[0]), self.anti_expert.begin(params["anti_expert"], cache[1])


@dataclasses.dataclass(frozen=True)
class _Apply:
    expert: SecondModel
    anti_expert: SecondModel

    def __call__(
        self, params: Any, cache: tuple[Any, Any], logits_BXV: jax.Array, context: HookContext
    ) -> tuple[jax.Array, tuple[Any, Any]]:
        expert_BXV, expert_cache = self.expert.logits(params["expert"], cache[0], context)
        anti_BXV, anti_cache = self.anti_expert.logits(params["anti_expert"], cache[1], context)
        return combine_logits(logits_BXV, expert_BXV, anti_BXV, params["alpha"]), (expert_cache, anti_cache)


@bounded(statics=(0,), weights=1)
def _combined_rows(archs: tuple[Arch, ...], params: tuple, alpha: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    rows = tokens_BT, positions_BT, jnp.ones_like(tokens_BT)
    hidden = [mtp.apply(arch, own, *rows)[0] for arch, own in zip(archs, params, strict=True)]
    zipped = zip(archs, params, hidden, strict=True)
    return combine_logits(*(trunk.logits(arch, own, hidden_BTD) for arch, own, hidden_BTD in zipped), alpha)
