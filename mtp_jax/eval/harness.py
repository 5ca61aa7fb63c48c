"""The adapter for lm-evaluation-harness (`lm_eval`): its tasks, run on a model of this package.

    python -m mtp_jax.eval.harness run --model mtp_jax --model_args source=runs/mine,draft=heads --tasks lambada_openai

or in Python:

    lm_eval.simple_evaluate(model=mtp_jax.eval.harness.HarnessLM(lm), tasks=["lambada_openai"])

The harness finds models by a decorator, not by entry points of packages. So this module must be imported before the
name `mtp_jax` is known to it; the command above does both. The scores are those of the harness's own model `hf` for the
same checkpoint: prompts and continuations are read by the same rules (`decode.scoring.score`).
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from mtp_jax.decode.generate import generate
from mtp_jax.decode.options import whole
from mtp_jax.decode.scoring import batched, score
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel, load

MAX_GEN_TOKS = 256
"""New tokens of a request that does not say how many; the number of the harness's model `hf`."""
ROWS = 16
"""Rows of a batch of generations, unless a batch size is given."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Options of `generate` that a task's `generation_kwargs` may set."""
IGNORED = ("do_sample", "until", "max_gen_toks")
"""Settings that are read here, after `normalize_gen_kwargs`."""


@register_model("mtp_jax")
class HarnessLM(TemplateLM):
    """A model of this package, for the harness."""

    def __init__(
        self,
        lm: LoadedModel | None = None,
        *,
        source: str = "",
        draft: str = "auto",
        num_draft: int | str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        **ignored: Any,
    ) -> None:
        """An adapter around a model.

        Args:
          lm: a loaded model. None loads `source`.
          source: what `mtp_jax.load` takes.
          draft, num_draft: who drafts in generations, and how much; see `generate`. Drafts change no answer.
          dtype: `float32`, `bfloat16` or None; for `source`.
          batch_size: most rows of a batch. None and `auto` choose it.
          max_length: most tokens that the model reads at once. None is the model's own limit.
          max_gen_toks: new tokens of requests that do not say how many.
          ignored: the harness's `device` and `max_batch_size`. The device is that of the model.

        Raises:
          UserError: neither a model nor a source is given, the model has no tokenizer, or a setting is unknown or out
            of range.
        """
        super().__init__()
        unknown = sorted(ignored.keys() - {"device", "max_batch_size"})
        if unknown:
            raise UserError(f"{unknown[0]} is no setting of the model mtp_jax; use source, draft, num_draft or dtype")
        if (lm is None) == (not source):
            raise UserError("give either a loaded model or source=..., one of them")
        self.lm = load(source, dtype=dtype, decode_only=True, shipped_heads=True) if lm is None else lm
        if self.lm.tokenizer is None:
            raise UserError("the harness works with texts, but this model has no tokenizer")
        self._name = source or self.lm.config.train.init_from or "mtp_jax"
        self._draft = {"draft": draft, "num_draft": _number(num_draft)}
        self._rows = None
        if batch_size not in (None, "auto"):
            self._rows = whole("batch_size", _number(batch_size), "1 or above", _some)
        self.max_length = self.lm.arch.model.max_seq_len
        if max_length is not None:
            limits = range(1, self.max_length + 1)
            self.max_length = whole("max_length", max_length, f"1 to {self.max_length}", limits.__contains__)
        self._max_gen_toks = whole("max_gen_toks", max_gen_toks, "1 or above", _some)
        self._rendered = False

    # What `TemplateLM` asks for.

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a document."""
        return self.lm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        """The token before a text that has no context."""
        return self.lm.tokenizer.start_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer and its template, for the harness's cache of requests."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's chat template, or an empty text. `chat_template` is whether one is wanted."""
        chat = self.lm.tokenizer.chat
        return chat.text if chat is not None and chat_template else ""

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of messages, with the beginning of an answer.

        If `add_generation_prompt` is False, the answer continues the last message, so the text ends inside of it.
        """
        chat = self.lm.tokenizer.chat
        if chat is None:
            raise UserError("this model has no chat template; give HarnessLM a model with one: lm.with_chat_template")
        self._rendered = True
        return chat.prompt(chat_history) if add_generation_prompt else chat.learned_of_cut(chat_history)[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """Token ids of a text. The tokens that begin a document are added, unless `add_special_tokens` is False."""
        tokenizer = self.lm.tokenizer
        if self._rendered and tokenizer.marks.special == "text":
            # Special tokens of a template must be read as such, which this tokenizer does only in rendered texts.
            return tokenizer.encode_rendered(string)
        return tokenizer.encode(string) if add_special_tokens is False else tokenizer.encode_prompt(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        contexts = [self._cut(context, len(continuation)) for _, context, continuation in requests]
        found = score(self.lm, contexts, [ids for *_, ids in requests], batch_size=self._rows)
        for (texts, *_), one in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(one))
        return [tuple(one) for one in found]

    def _cut(self, context: list[int], following: int) -> list[int]:
        """The last tokens of a context that leave room for so many tokens after it, the last of which is not read."""
        return context[max(len(context) + following - 1 - self.max_length, 0) :]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows of `max_length` tokens, each token in one of them."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = [(None, *window) for several in windows for window in several]
        found = iter(self._loglikelihood_tokens(flat))
        sums = [sum(logprob for logprob, _ in itertools.islice(found, len(several))) for several in windows]
        for request, logprob in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return sums

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        ids = self.tok_encode(text)
        windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
        return map(utils.make_disjoint_window, windows)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers to prompts. Requests with the same settings share batches."""
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        order = sorted(range(len(requests)), key=lambda row: (settings[row], -len(prompts[row])))
        answers: dict[int, str] = {}
        for _, alike in itertools.groupby(order, settings.__getitem__):
            for batch in batched(list(alike), self._rows or ROWS):
                options = requests[batch[0]].args[1]
                answers |= zip(batch, self._answers([prompts[row] for row in batch], options), strict=True)
        for row, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[row])
        return [answers[row] for row in range(len(requests))]

    def _answers(self, prompts: list[list[int]], settings: Mapping[str, Any]) -> list[str]:
        given = normalize_gen_kwargs(dict(settings), self._max_gen_toks)
        unknown = sorted(given.keys() - {*SAMPLING, *IGNORED})
        if unknown:
            raise UserError(f"the task sets {unknown[0]} in generation_kwargs; there are {', '.join(SAMPLING)}, until")
        new = given["max_gen_toks"]
        room = self.max_length - new
        if room < 1:
            raise UserError(
                f"max_gen_toks={new} leaves no room for a prompt in {self.max_length} tokens; make it smaller"
            )
        stop = [term for term in given["until"] if term]
        options = {name: given[name] for name in SAMPLING if name in given}
        out = generate(
            self.lm, [ids[-room:] for ids in prompts], max_new_tokens=new, stop=stop, **self._draft, **options
        )
        return [postprocess_generated_text(text, stop, None) for text in out.text]


def _number(value: Any) -> Any:
    """A number from a text of the command line; other values unchanged."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _some(count: int) -> bool:
    return count >= 1


if __name__ == "__main__":
    cli_evaluate()
