"""Does what changes nothing change no token, on a real model? And are the log-probabilities those of other programs?

    python benchmarks/identities.py DATA [--reference EXPORT] [--new-tokens 48] [--out runs/identities]

DATA is a folder with `gsm8k_test.jsonl`, `humaneval.jsonl`, `mbpp_test.jsonl` and `mtbench_prompts.jsonl`: two prompts
of each are read. All prompts are decoded in one batch, in float32, with SmolLM2-135M-Instruct and the heads of this
package. EXPORT is the same model as a directory of transformers (`mtp export smollm2 EXPORT`): with it, the
log-probabilities are compared with those of torch, and `mtp_jax.score` with lm-evaluation-harness (extra `eval`).

The expert of the proxy-tuning lines is the same model with noise of 2 % on its matrices. So it speaks otherwise. Lines
of the table are kept in `--out`; a run that was cut off makes the others.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from harness_scores import harness_rows
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.cli.common import own_directory
from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.decode.result import Generation
from mtp_jax.eval.kept import append, open_kept
from mtp_jax.loading import LoadedModel
from mtp_jax.runs.compiled import keep_compiled

SOURCE = "smollm2"
FILES = {"gsm8k_test": "question", "humaneval": "prompt", "mbpp_test": "prompt", "mtbench_prompts": "prompt"}
"""Files and their fields with the prompt."""
EACH = 2
NOISE = 0.02
SAME_LOGITS = mtp_jax.Hook("same logits", apply=lambda params, cache, logits_BXV, context: (logits_BXV, cache))
DRAWN = {"temperature": 0.8, "top_p": 0.95, "seed": 1}
Row = tuple[str, ...]
COLUMNS = ("identity", "prompts", "tokens", "identical", "largest difference of log-probabilities")


class Case(NamedTuple):
    """Something that must give the tokens of something else."""

    name: str
    options: dict[str, Any]
    like: str
    """The attribute of the setup that it must equal."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """Models, prompts and the number of new tokens."""

    lm: LoadedModel
    expert: LoadedModel
    prompts: list[list[int]]
    new_tokens: int

    @functools.cached_property
    def greedy(self) -> Generation:
        """Plain decoding."""
        return self.run(draft="none")

    @functools.cached_property
    def drawn(self) -> Generation:
        """Plain decoding with chance."""
        return self.run(draft="none", **DRAWN)

    @functools.cached_property
    def spoken(self) -> Generation:
        """Plain decoding of the expert."""
        return self.run(self.expert, draft="none")

    def run(self, lm: LoadedModel | None = None, **options: Any) -> Generation:
        """Tokens and records of all prompts."""
        kept = {"max_new_tokens": self.new_tokens, "ignore_eos": True, "logprobs": 0}
        return mtp_jax.generate(lm or self.lm, self.prompts, **kept | options)


def read_prompts(data: pathlib.Path, lm: LoadedModel) -> list[list[int]]:
    """Two prompts of each file, as tokens; those that are no code are messages."""
    found = []
    for name, field in FILES.items():
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:EACH]
        texts = [json.loads(line)[field] for line in lines]
        asked = texts if name == "humaneval" else [[{"role": "user", "content": text}] for text in texts]
        found += [prompt_ids(lm, prompt, 0) for prompt in asked]
    return found


def noisy(lm: LoadedModel) -> LoadedModel:
    """The model with noise on its matrices."""
    rng = np.random.default_rng(0)

    def changed(leaf: Any) -> Any:
        values = np.asarray(leaf)
        if values.ndim < 2 or not np.issubdtype(values.dtype, np.floating):
            return leaf
        drawn = rng.standard_normal(values.shape, np.float32)
        return jax.device_put((values + NOISE * values.std() * drawn).astype(values.dtype))

    return dataclasses.replace(lm, params=jax.tree.map(changed, lm.params))


def cases(setup: Setup) -> list[Case]:
    """All identities of tokens."""
    lm = setup.lm
    expert = setup.expert
    drafts = [
        Case(f"draft={draft}, num_draft={num_draft}, {how}", {"draft": draft, "num_draft": num_draft} | options, like)
        for draft, num_draft in (("heads", 1), ("heads", None), ("lookup", 3), ("heads+lookup", None))
        for how, options, like in (("greedy", {}, "greedy"), ("drawn", DRAWN, "drawn"))
    ]
    alone = mtp_jax.ProxyTuning(expert, lm, 0.0)
    same = mtp_jax.ProxyTuning(expert, expert, 1.7)
    whole = mtp_jax.ProxyTuning(expert, lm, 1.0)
    one = mtp_jax.SoftThinking(max_topk=1, cold_entropy=0.0, end=("####",))
    hooks = [
        Case(f"{name}, {draft}", {"hooks": [hook], "draft": draft}, like)
        for name, hook, like in (
            ("a hook that does nothing", SAME_LOGITS, "greedy"),
            ("alpha 0", alone, "greedy"),
            ("expert = anti-expert, alpha 1.7", same, "greedy"),
            ("base = anti-expert, alpha 1", whole, "spoken"),
            ("soft thinking, max_topk=1", one, "greedy"),
        )
        for draft in ("none", "heads+lookup")
    ]
    return [*drafts, *hooks]


def largest(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """The largest difference between numbers of the same places; only as far as rows are equally long."""
    pairs = zip(one, other, strict=True)
    return max(float(np.max(np.abs(np.subtract(a, b)))) for a, b in pairs)


def of_rows(lm: LoadedModel, prompts: list[list[int]], made: Generation, proxy: Any = None) -> list[np.ndarray]:
    """Log-probabilities [V] of each new position, from whole rows: of a model, or of a combination."""
    rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, made.tokens, strict=True)]
    width = max(map(len, rows))
    found = []
    for prompt, row in zip(prompts, rows, strict=True):
        row_1T = np.array([row + [0] * (width - len(row))])  # one width, so that one program is enough
        logits_TV = (lm.logits(row_1T)[0] if proxy is None else proxy.combined_logits(lm, row_1T))[0]
        found.append(np.asarray(jax.nn.log_softmax(logits_TV[len(prompt) - 1 : len(row) - 1])))
    return found


def chosen(logprob_TV: list[np.ndarray], made: Generation) -> list[np.ndarray]:
    """Those of the tokens that were chosen."""
    pairs = zip(logprob_TV, made.tokens, strict=True)
    return [own_TV[np.arange(len(tokens)), tokens] for own_TV, tokens in pairs]


def are_best(logprob_TV: list[np.ndarray], made: Generation) -> bool:
    """Whether every token is the most likely one."""
    pairs = zip(logprob_TV, made.tokens, strict=True)
    return all(own_TV.argmax(-1).tolist() == list(tokens) for own_TV, tokens in pairs)


def token_rows(setup: Setup, case: Case) -> list[Row]:
    """The line of an identity of tokens."""
    made = setup.run(**case.options)
    truth = getattr(setup, case.like)
    # The records of a steered model are the base's own, so they can only be compared where the base speaks.
    own = case.like != "spoken" and made.tokens == truth.tokens
    apart = f"{largest(made.logprobs, truth.logprobs):.1e}" if own else "-"
    return [line(case.name, made, made.tokens == truth.tokens, apart)]


def line(name: str, made: Generation, same: bool, apart: str) -> Row:
    """A line of the table."""
    return (name, str(len(made.tokens)), str(sum(map(len, made.tokens))), "yes" if same else "NO", apart)


def logit_rows(setup: Setup) -> list[Row]:
    """Records against `lm.logits`."""
    whole = of_rows(setup.lm, setup.prompts, setup.greedy)
    apart = largest(setup.greedy.logprobs, chosen(whole, setup.greedy))
    return [line("logprobs = log-softmax of lm.logits", setup.greedy, are_best(whole, setup.greedy), f"{apart:.1e}")]


def rounding_rows(setup: Setup) -> list[Row]:
    """The combination b + (e - b) against the expert, over the whole vocabulary."""
    proxy = mtp_jax.ProxyTuning(setup.expert, setup.lm, 1.0)
    own = of_rows(setup.expert, setup.prompts, setup.spoken)
    steered = of_rows(setup.lm, setup.prompts, setup.spoken, proxy)
    same = all(np.array_equal(one.argmax(-1), other.argmax(-1)) for one, other in zip(own, steered, strict=True))
    margin = min(float(np.min(np.diff(np.sort(one, axis=-1)[:, -2:]))) for one in own)
    name = f"base + 1 (expert - base) = expert at every token; smallest margin of the first token {margin:.1e}"
    apart = max(float(np.abs(one - other).max()) for one, other in zip(own, steered, strict=True))
    return [line(name, setup.spoken, same, f"{apart:.1e}")]


def torch_rows(setup: Setup, reference: str) -> list[Row]:
    """Records against transformers on torch, drafted or not, over the whole vocabulary."""
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    rows = []
    for name, options in (("plain", {"draft": "none"}), ("heads+lookup", {"draft": "heads+lookup"})):
        made = setup.run(**options)
        found = []
        for prompt, tokens in zip(setup.prompts, made.tokens, strict=True):
            with torch.no_grad():
                logits_TV = theirs(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            found.append(torch.log_softmax(logits_TV, dim=-1).numpy())
        apart = largest(made.logprobs, chosen(found, made))
        rows.append(line(f"logprobs = those of transformers, {name}", made, are_best(found, made), f"{apart:.1e}"))
    return rows


def steps(setup: Setup, args: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    """What makes the lines, by name."""
    found = {case.name: functools.partial(token_rows, setup, case) for case in cases(setup)}
    found |= {"logits": functools.partial(logit_rows, setup), "rounding": functools.partial(rounding_rows, setup)}
    if args.reference:
        found["torch"] = functools.partial(torch_rows, setup, args.reference)
        found["harness"] = functools.partial(score_rows, setup, args)
    return found


def score_rows(setup: Setup, args: argparse.Namespace) -> list[Row]:
    """`mtp_jax.score` against lm-evaluation-harness."""
    with tempfile.TemporaryDirectory() as folder:
        return harness_rows(setup.lm, args.reference, args.data, pathlib.Path(folder))


def made_rows(setup: Setup, args: argparse.Namespace) -> list[Row]:
    """All lines, made now or read from the file."""
    path = args.out / "lines.jsonl"
    header = {"prompts": setup.prompts, "new_tokens": setup.new_tokens, "reference": args.reference}
    done = open_kept(path, header, {"step": str, "rows": list}, ("step",))
    rows = []
    for name, make in steps(setup, args).items():
        if (name,) not in done:
            done[(name,)] = {"step": name, "rows": make()}
            append(path, [done[(name,)]])
        rows += done[(name,)]["rows"]
        print(f"{name} is done", flush=True)
    return rows


def main() -> None:
    """Decodes, compares and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--reference", default="", help="the model as a directory of transformers")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/identities"))
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    keep_compiled(own_directory(SOURCE))
    lm = mtp_jax.load(SOURCE, dtype="float32", shipped_heads=True)
    setup = Setup(lm, noisy(lm), read_prompts(args.data, lm), args.new_tokens)
    rows = made_rows(setup, args)
    note = (
        f"`{SOURCE}` in float32, {len(setup.prompts)} prompts of {len(FILES)} kinds in one batch, {args.new_tokens} "
        "new tokens each. identical: all tokens are those of the other side (for scores: all choices)."
    )
    Report("Identities of decoding", COLUMNS, rows, note).publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
