"""The caller's settings for choosing tokens: checks them, and makes the static `Sampler` and the traced `Controls`."""

import dataclasses
import difflib
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode.brought import arguments
from mtp_jax.decode.hooks import Hook, HookMaker
from mtp_jax.decode.sampling import Controls, LogitsFn, Sampler, row_keys
from mtp_jax.decode.verify import Rule
from mtp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """How tokens are chosen and accepted, and what is recorded of them.

    `generate`, `stream` and `Conversation` also take the fields as keywords.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Draw only from the k most likely tokens."""
    top_p: float | None = None
    """Draw only from the smallest set of most likely tokens that together have at least this probability."""
    min_p: float | None = None
    """Draw only from tokens with at least this fraction of the probability of the most likely one."""
    seed: int | Sequence[int] = 0
    """One number for all rows, or one per row. A row is a prompt, or a sample of it. With one for all, the seed of a
    row depends on its place in the batch. With one per row, a row gets the same tokens at any place."""
    repetition_penalty: float = 1.0
    """For tokens that are in the prompt or the output, divides positive logits and multiplies negative ones."""
    logit_bias: Mapping[int, float] | None = None
    """Numbers that are added to the logits of tokens. -inf forbids a token."""
    logits_fn: LogitsFn | None = None
    """`(logits_V, tokens_S, length) -> logits_V`, a jax function that changes the logits after the first `length`
    tokens of a row. Pass the same function object in every call: every new one is compiled."""
    hooks: Sequence[Hook | HookMaker] = ()
    """Functions with parameters and caches that change the model's logits or its input. They change the logits in this
    order, and before all settings above."""
    accept: str | Rule = "exact"
    """`exact`; or `rejection`, which keeps the distribution but not the tokens; or the lossy rules `typical` and
    `confidence`, which may accept drafts that the model would not have chosen. A `mtp_jax.Rule` sets their thresholds.
    At temperature 0, `typical` uses the model's distribution at temperature 1. For standalone models also `all` and
    `confadapt`, which emit predictions without verification."""
    hot_temperature: float | None = None
    """The temperature where the model is unsure: for tokens with a distribution of an entropy above `hot_entropy`. All
    others have `temperature`. None: all tokens have it."""
    hot_entropy: float | None = None
    """The entropy in nats above which `hot_temperature` is used. It is that of the changed logits, at temperature 1 and
    before `top_k`, `top_p` and `min_p`."""
    logprobs: int | None = None
    """Keeps records of every new token: its log-probability, the entropy of the model's distribution, and this number
    of most likely tokens; 0 keeps the first two only. All are of the model's own logits, before hooks and the settings
    above. None keeps no records."""
    logprobs_tempered: bool = False
    """The records are of the model's own logits divided by `temperature`: of the distribution that tokens are drawn
    from, without filters."""

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, "0 for greedy, or from 1e-6 to 1e6", _is_temperature)
        if self.top_k is not None:
            whole("top_k", self.top_k, "1 or above", lambda k: k >= 1)
        if self.top_p is not None:
            _number("top_p", self.top_p, "above 0, at most 1", lambda p: 0 < p <= 1)
        if self.min_p is not None:
            _number("min_p", self.min_p, "from 0 to 1", lambda p: 0 <= p <= 1)
        _number(
            "repetition_penalty", self.repetition_penalty, "from 1e-6 to 1e6; 1 for none", lambda r: 1e-6 <= r <= 1e6
        )
        self._check_hot()
        if self.logits_fn is not None and not callable(self.logits_fn):
            raise UserError(f"logits_fn={self.logits_fn!r}; it must be a function of (logits, tokens, length)")
        if not isinstance(self.logits_fn, Hashable):
            raise UserError(f"logits_fn={self.logits_fn!r} has no hash, but compiling needs one; give a plain function")
        if not isinstance(self.hooks, Sequence) or not all(isinstance(hook, Hook | HookMaker) for hook in self.hooks):
            raise UserError(
                f"hooks={self.hooks!r}; it must be a list of mtp_jax.Hook, or of classes that make one, such as "
                "ProxyTuning and SoftThinking"
            )
        if self.logprobs is not None:
            whole("logprobs", self.logprobs, "0 or above; 0 gives no other tokens than the chosen ones", _is_count)
        if self.logprobs_tempered and (self.logprobs is None or self.temperature == 0):
            raise UserError(
                f"logprobs_tempered=True with logprobs={self.logprobs} and temperature={self.temperature}; it needs "
                "logprobs, and a temperature above 0"
            )

    def _check_hot(self) -> None:
        """Refuses a second temperature that is not whole, or has no meaning."""
        names = ("hot_temperature", "hot_entropy")
        missing = [name for name in names if getattr(self, name) is None]
        if len(missing) == 2:
            return
        if missing:
            (given,) = set(names) - set(missing)
            raise UserError(f"{given}={getattr(self, given)!r} needs {missing[0]}, too")
        _number("hot_temperature", self.hot_temperature, "from 1e-6 to 1e6", lambda t: 1e-6 <= t <= 1e6)
        _number("hot_entropy", self.hot_entropy, "0 or above, in nats", lambda limit: 0 <= limit < math.inf)
        if self.temperature == 0:
            raise UserError(
                f"hot_temperature={self.hot_temperature!r} at temperature 0, which draws nothing; give a temperature "
                "above 0"
            )
        if self.logprobs_tempered:
            raise UserError(
                f"logprobs_tempered=True with hot_temperature={self.hot_temperature!r}: records are at one "
                "temperature; leave one of them out"
            )

    @classmethod
    def of(cls, options: "Options | None", keywords: Mapping[str, Any]) -> "Options":
        """Options with some fields replaced by keywords.

        Raises:
          TypeError: a keyword is not the name of a field.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in keywords:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
                raise TypeError(f"unknown option {name!r}; {hint}")
        return dataclasses.replace(options or cls(), **keywords)

    def rule(self) -> Rule:
        """The accept rule."""
        return self.accept if isinstance(self.accept, Rule) else Rule(self.accept)

    def sampler(self) -> Sampler:
        """The settings that are compiled into programs."""
        return Sampler(
            sampled=self.temperature > 0,
            penalised=self.repetition_penalty != 1,
            biased=self.logit_bias is not None,
            logits_fn=self.logits_fn,
            two_temperatures=self.hot_temperature is not None,
        )

    def check_logprobs(self, vocab_size: int) -> None:
        """Refuses more most likely tokens than there are."""
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise UserError(
                f"logprobs={self.logprobs}, but the vocabulary has {vocab_size} tokens; use 0..{vocab_size}"
            )

    def check_logits_fn(self, vocab_size: int, length: int) -> None:
        """Refuses a `logits_fn` that does not return logits for the vocabulary. Nothing is compiled for this."""
        if self.logits_fn is None:
            return
        shapes = ((vocab_size,), jnp.float32), ((length,), jnp.int32), ((), jnp.int32)
        try:
            made = jax.eval_shape(self.logits_fn, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"logits_fn fails when it is traced with (logits [{vocab_size}], tokens [{length}], length): {line}"
            ) from error
        if getattr(made, "shape", None) != (vocab_size,):
            got = getattr(made, "shape", made)
            raise UserError(f"logits_fn returns {got}; it must return the {vocab_size} logits of one row")

    def controls(self, rows: int, vocab_size: int, filled: int = 0) -> Controls:
        """The numbers and keys of the sampler, and the parameters of hooks.

        Args:
          rows: rows of the batch.
          vocab_size: V.
          filled: rows of the batch with padding; a smaller number than `rows` means no padding.
        """
        seed = self._seed(rows)
        bias_V = self._bias(vocab_size)
        filled = max(rows, filled)
        if not isinstance(seed, int):
            seed = seed + [0] * (filled - rows)

        def number(value: float | None, off: float) -> jax.Array:
            return jnp.float32(off if value is None else value)

        return Controls(
            key_B=row_keys(seed, filled),
            temperature=number(self.temperature, 0.0),
            top_k=jnp.int32(vocab_size if self.top_k is None else min(self.top_k, vocab_size)),
            top_p=number(self.top_p, 1.0),
            min_p=number(self.min_p, 0.0),
            penalty=number(self.repetition_penalty, 1.0),
            bias_V=jnp.asarray(bias_V),
            hot_temperature=number(self.hot_temperature, 1.0),
            hot_entropy=number(self.hot_entropy, 0.0),
            hooks=tuple(arguments(f"hook {hook.name!r}", hook.params) for hook in self.hooks),
        )

    def _seed(self, rows: int) -> int | list[int]:
        def check(seed: Any) -> int:
            return whole("seed", seed, "from 0 to 2**64 - 1", lambda s: 0 <= s < 1 << 64)

        if not isinstance(self.seed, Sequence | np.ndarray) or np.ndim(self.seed) == 0:
            return check(self.seed)
        if len(self.seed) != rows:
            raise UserError(
                f"seed has {len(self.seed)} numbers for {rows} rows; give one per prompt and sample, or one for all"
            )
        return [check(seed) for seed in self.seed]

    def _bias(self, vocab_size: int) -> np.ndarray:
        if self.logit_bias is None:
            return np.zeros((0,), np.float32)
        if not isinstance(self.logit_bias, Mapping):
            raise UserError(f"logit_bias={self.logit_bias!r}; it must map token ids to numbers")
        bias_V = np.zeros((vocab_size,), np.float32)
        for token, value in self.logit_bias.items():
            inside = f"a token id from 0 to {vocab_size - 1}"
            token = whole("logit_bias: token", token, inside, lambda t: 0 <= t < vocab_size)
            _number(f"logit_bias[{token}]", value, "from -1e30 to 1e30, or -inf to forbid the token", _is_bias)
            bias_V[token] = value
        if np.all(bias_V == -np.inf):
            raise UserError(f"logit_bias forbids all {vocab_size} tokens; leave at least one")
        return bias_V


def takes_options(function: Callable) -> Callable:
    """Adds the fields of `Options` to the signature of a function that takes them as keywords."""
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(Options)
    ]
    function.__signature__ = signature.replace(parameters=own + fields)
    return function


def _is_temperature(value: float) -> bool:
    return value == 0 or 1e-6 <= value <= 1e6


def _is_count(value: int) -> bool:
    return value >= 0


def _is_bias(value: float) -> bool:
    return value == -math.inf or -1e30 <= value <= 1e30


def _number(name: str, value: Any, wanted: str, fits: Callable[[float], bool]) -> None:
    """Refuses a value that is not a number, is NaN, or is out of range."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not fits(value):
        raise UserError(f"{name}={value!r}; it must be {wanted}")


def whole(name: str, value: Any, wanted: str, fits: Callable[[int], bool]) -> int:
    """The value as an int. Refuses a value that is not a whole number, or is out of range."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not fits(number):
        raise UserError(f"{name}={value!r}; it must be a whole number, {wanted}")
    return number
