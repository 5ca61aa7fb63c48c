"""Does predicting several tokens make a fine-tune better? Four ways to tune one model for one task, and two controls.

    python benchmarks/fine_tuning.py MOLECULES [--seeds 3] [--arms next-full caft-lora ...] [--minutes 60]

MOLECULES is a wheel of `molsets` (`pip download --no-deps molsets`), or a text file with one SMILES per line. The
script needs `rdkit` (`pip install '.[chem]'`). The task: write a molecule for a description, see `molecules.py`.

The script trains a base model on plain molecules. Then it trains heads on the frozen base, on molecules that the base
has drawn (phase 1 of CAFT, arXiv 2506.07833). All arms start from this base:

    next-full    next-token loss, all parameters
    next-lora    next-token loss, LoRA of rank 8 on all matrices of the blocks
    caft-lora    plus the loss of the frozen heads (weight 0.01 * 0.8^m, which falls to 0 along a sine), LoRA
    caft-full    the same, all parameters of the trunk
    naive-full   new heads, weight 1 for every head, all parameters (Gloeckle et al. 2024, on a trained model)
    caft-heavy   caft-full with the weight 1 in place of 0.01
    shuffled     caft-full on pairs in which every prompt has the answer of another one: a control that must fail

A seed has its own training pairs, in its own order. All arms see the same pairs, in the same order, for the same steps.
The learning rate is the one of a grid with the most matches on the validation prompts, for seed 0. It is chosen with
next-token loss, for full tuning and for LoRA, and the other arms use it too. So no arm but the two next-token arms is
tuned. With `--own-rates` every arm has its own choice. Runs that exist are not trained again.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
import tyro
from fine_tuning_table import COLUMNS, UNTUNED, Measured, claims, line
from molecule_scores import TEMPERATURE, Scores, drawn, score
from molecules import Pair, describe, fitting, read_smiles, rows_of, write_rows, write_texts
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.runs.compiled import keep_compiled

CAFT = {"extra_weight": 0.01, "decay": 0.8, "schedule": "rsine"}
LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.1}
TRUNK = "^(?!heads/)"
"""Everything but the heads."""
DONE = "done"
"""File of a run that is trained."""
WIDE = (1e-3, 3e-3, 1e-2)
NARROW = (3e-3, 1e-2, 3e-2)
"""Learning rates for adapters, which need larger ones."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to fine-tune."""

    heads: str = "none"
    """none, frozen (those of phase 1) or new."""
    trainable: str = "all"
    loss: dict[str, Any] = dataclasses.field(default_factory=dict)
    rates: tuple[float, ...] = WIDE
    rate_of: str = ""
    """The arm that chooses the learning rate without `--own-rates`; "" is the arm itself."""
    shuffled: bool = False
    """Whether the answers belong to other prompts."""


ARMS = {
    "next-full": Arm(),
    "next-lora": Arm(trainable="lora", rates=NARROW),
    "caft-lora": Arm(heads="frozen", trainable="lora", loss=CAFT, rates=NARROW, rate_of="next-lora"),
    "caft-full": Arm(heads="frozen", trainable=TRUNK, loss=CAFT, rate_of="next-full"),
    "naive-full": Arm(heads="new", rate_of="next-full"),
    "caft-heavy": Arm(heads="frozen", trainable=TRUNK, loss=CAFT | {"extra_weight": 1.0}, rate_of="next-full"),
    "shuffled": Arm(heads="frozen", trainable=TRUNK, loss=CAFT, rate_of="next-full", shuffled=True),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of models, data and runs."""

    d_model: int = 128
    num_layers: int = 4
    num_future: int = 4
    """M, number of heads, the next-token head included."""
    vocab_size: int = 320
    """Small, so that groups and rings are several tokens."""
    base_molecules: int = 100_000
    base_steps: int = 1000
    """Steps of 2,016 tokens."""
    samples: int = 8_000
    """Molecules that the base draws for phase 1."""
    heads_steps: int = 300
    pairs: int = 2048
    epochs: int = 2
    pool: int = 20_000
    """Pairs that the seeds draw theirs from."""
    valid: int = 300
    """Validation prompts."""
    prompts: int = 400
    """Held-out prompts."""
    draws: int = 4
    """Answers per prompt."""
    length: int = 40
    """Largest number of tokens of a prompt with its answer."""

    @property
    def heads(self) -> dict[str, Any]:
        """Heads as in CAFT: blocks at the input of the last block of the trunk."""
        return {"num_future": self.num_future, "tap": -1}


TINY = Sizes(32, 2, 3, 260, 60, 4, 16, 4, 16, 1, 40, 8, 8, 2, 60)
"""Everything runs, and nothing is learned."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    molecules: tyro.conf.Positional[pathlib.Path]
    """A wheel of molsets, or a text file of SMILES."""
    out: pathlib.Path = pathlib.Path("runs/fine_tuning")
    """Directory for everything that is trained."""
    seeds: int = 3
    arms: tuple[str, ...] = tuple(ARMS)
    """Which arms to run."""
    own_rates: bool = False
    """Whether every arm chooses its own learning rate, which takes more runs."""
    minutes: float = 0
    """No run begins after this time; 0 is no limit. The table then has what is done."""
    tiny: bool = False
    """A run of seconds that only shows that everything works."""
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    results: str = RESULTS
    """File that the table is appended to; empty only prints it."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all arms share."""

    out: pathlib.Path
    sizes: Sizes
    base: mtp_jax.LoadedModel
    heads: mtp_jax.LoadedModel
    """The base with the heads of phase 1."""
    pool: list[Pair]
    valid: list[Pair]
    test: list[Pair]
    deadline: float
    own_rates: bool

    def config(self, arm: Arm, source: pathlib.Path, rate: float, seed: int) -> mtp_jax.Config:
        """The config of one run."""
        sizes = self.sizes
        batch = 16
        steps = max(sizes.pairs * sizes.epochs // (2 * batch), 1)
        sections: dict[str, dict[str, Any]] = {
            "loss": arm.loss,
            # A row has two pairs.
            "data": {"source": str(source), "seq_len": 2 * sizes.length + 1, "seed": seed, "eval_fraction": 0.05},
            "optim": {
                "learning_rate": rate,
                "schedule": "cosine",
                "warmup_steps": min(10, steps),
                "weight_decay": 0.0,
            },
            "train": {
                "trainable": arm.trainable,
                "steps": steps,
                "batch_size": batch,
                "seed": seed,
                "checkpoint_every": steps,
                "log_every": max(steps // 8, 1),
            },
        }
        if arm.trainable == "lora":
            sections["lora"] = LORA
        if arm.heads == "new":
            sections["heads"] = sizes.heads
        return mtp_jax.start_from(self.out / ("heads" if arm.heads == "frozen" else "base"), **sections)


def run_once(config: mtp_jax.Config, workdir: pathlib.Path) -> mtp_jax.LoadedModel:
    """Trains a run, or what is left of it, and loads it."""
    if not mtp_jax.train(config, workdir).finished:
        raise SystemExit(130)
    return mtp_jax.load(workdir)


def train_base(out: pathlib.Path, sizes: Sizes, texts: list[str]) -> mtp_jax.LoadedModel:
    """The base model, trained on plain molecules."""
    source = out / "data" / "plain.jsonl"
    if not source.exists():
        write_texts(source, texts)
    heads = sizes.d_model // 32
    model = mtp_jax.ModelConfig(
        vocab_size=sizes.vocab_size,
        num_layers=sizes.num_layers,
        d_model=sizes.d_model,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=32,
        d_ff=sizes.d_model * 8 // 3 // 8 * 8,
        max_seq_len=128,
    )
    config = mtp_jax.Config(
        model=model,
        heads=mtp_jax.HeadsConfig(num_future=1),
        data=mtp_jax.DataConfig(source=str(source), seq_len=126, eval_fraction=0.005 if len(texts) > 1000 else 0.1),
        optim=mtp_jax.OptimConfig(learning_rate=3e-3, warmup_steps=min(100, sizes.base_steps)),
        train=mtp_jax.TrainConfig(steps=sizes.base_steps, batch_size=16, log_every=50),
        decode=mtp_jax.DecodeConfig(prompt_tokens=2, max_new_tokens=60),
    )
    return run_once(config, out / "base")


def train_heads(out: pathlib.Path, sizes: Sizes, base: mtp_jax.LoadedModel) -> mtp_jax.LoadedModel:
    """Phase 1: heads on the frozen base, which begin as copies of its last block but one. They learn from molecules
    that the base itself has drawn."""
    source = out / "data" / "drawn.jsonl"
    if not source.exists():
        drawn_texts = []
        for start in range(0, sizes.samples, 250):
            seeds = list(range(start, min(start + 250, sizes.samples)))
            begins = [[base.tokenizer.bos_id]] * len(seeds)
            options = {"temperature": 1.0, "seed": seeds, "draft": "none"}
            drawn_texts += mtp_jax.generate(base, begins, max_new_tokens=60, **options).text
        write_texts(source, drawn_texts)
    config = mtp_jax.start_from(
        out / "base",
        heads=sizes.heads | {"init": "copy_block", "init_block": -2},
        loss={"decay": 0.8},
        data={"source": str(source), "seq_len": 126, "eval_fraction": 0.1},
        optim={"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": min(50, sizes.heads_steps)},
        train={"trainable": "heads", "steps": sizes.heads_steps, "batch_size": 16, "keep_states": True},
    )
    return run_once(config, out / "heads")


def training_rows(setup: Setup, arm: Arm, seed: int) -> pathlib.Path:
    """The file with the training pairs of a seed."""
    path = setup.out / "data" / f"pairs_{seed}{'_shuffled' * arm.shuffled}.npy"
    if not path.exists():
        rng = np.random.default_rng(seed)
        chosen = [setup.pool[index] for index in rng.permutation(len(setup.pool))[: setup.sizes.pairs]]
        if arm.shuffled:
            answers = [pair.answer for pair in chosen]
            chosen = [Pair(pair.prompt, answer) for pair, answer in zip(chosen, answers[1:] + answers[:1], strict=True)]
            chosen = fitting(chosen, setup.base.tokenizer, setup.sizes.length)
        write_rows(path, rows_of(chosen, setup.base.tokenizer, setup.sizes.length))
    return path


def run_of(setup: Setup, name: str, seed: int, rate: float) -> pathlib.Path:
    """Directory of a run."""
    return setup.out / "runs" / f"{name}_{seed}_{rate:g}"


def tuned(setup: Setup, name: str, seed: int, rate: float) -> mtp_jax.LoadedModel | None:
    """The model of one run; None if it is not trained yet and the time is over."""
    workdir = run_of(setup, name, seed, rate)
    arm = ARMS[name]
    if time.monotonic() > setup.deadline and not (workdir / DONE).exists():
        return None
    lm = run_once(setup.config(arm, training_rows(setup, arm, seed), rate, seed), workdir)
    (workdir / DONE).touch()
    return lm


def best_rate(setup: Setup, name: str) -> float | None:
    """The learning rate with the most matches on the validation prompts, for seed 0; None if the time is over."""
    name = name if setup.own_rates else ARMS[name].rate_of or name
    found = {}
    for rate in ARMS[name].rates:
        kept = run_of(setup, name, 0, rate) / "valid.json"
        if not kept.exists():
            lm = tuned(setup, name, 0, rate)
            if lm is None:
                return None
            answers = drawn(lm, setup.valid, setup.sizes.length, setup.sizes.draws)
            match = float((answers == np.array([pair.prompt for pair in setup.valid])).mean())
            kept.write_text(json.dumps({"match": match}), encoding="utf-8")
            print(f"{name}, rate {rate:g}: {match:.1%} match on validation", flush=True)
        found[rate] = json.loads(kept.read_text(encoding="utf-8"))["match"]
    return max(found, key=found.get)


def scored(setup: Setup, name: str, seed: int, rate: float) -> Scores | None:
    """Scores of one run on the held-out prompts; None if the time is over."""
    kept = run_of(setup, name, seed, rate) / "test.json"
    if not kept.exists():
        lm = tuned(setup, name, seed, rate)
        if lm is None:
            return None
        kept.write_text(json.dumps(scores_of(setup, lm)._asdict()), encoding="utf-8")
    return Scores(**json.loads(kept.read_text(encoding="utf-8")))


def scores_of(setup: Setup, lm: mtp_jax.LoadedModel) -> Scores:
    """Scores of a model on the held-out prompts."""
    return score(lm, setup.heads, setup.test, setup.sizes.length, setup.sizes.draws)


def seconds_of(workdir: pathlib.Path) -> float:
    """Seconds that a run's steps take where they are fastest, without compiling, evaluation and saving."""
    records = mtp_jax.read_metrics(workdir)
    steps = [record["step_seconds"] for record in records if "step_seconds" in record]
    return min(steps) * max(record["step"] for record in records) if steps else float("nan")


def prepare(args: Args, sizes: Sizes) -> Setup:
    """Data, base and heads."""
    keep_compiled(args.out)
    smiles = read_smiles(args.molecules)
    behind = sizes.base_molecules
    base = train_base(args.out, sizes, smiles[:behind])
    spare = (sizes.pool + sizes.valid + sizes.prompts) * 11 // 10  # some pairs are too long
    pairs = [Pair(str(describe(one)), one) for one in smiles[behind : behind + spare]]
    pairs = fitting(pairs, base.tokenizer, sizes.length)
    write_texts(args.out / "data" / "heldout.jsonl", (pair.answer for pair in pairs[: sizes.prompts]))
    cuts = (sizes.prompts, sizes.prompts + sizes.valid, sizes.prompts + sizes.valid + sizes.pool)
    return Setup(
        out=args.out,
        sizes=sizes,
        base=base,
        heads=train_heads(args.out, sizes, base),
        test=pairs[: cuts[0]],
        valid=pairs[cuts[0] : cuts[1]],
        pool=pairs[cuts[1] : cuts[2]],
        deadline=time.monotonic() + 60 * args.minutes if args.minutes else float("inf"),
        own_rates=args.own_rates,
    )


def measure(setup: Setup, args: Args) -> dict[str, Measured]:
    """Scores of every arm and seed, with a line for each as they come."""
    rates = {name: best_rate(setup, name) for name in args.arms}
    found: dict[str, Measured] = {}
    for seed in range(args.seeds):
        for name, rate in rates.items():
            scores = None if rate is None else scored(setup, name, seed, rate)
            if scores is None:
                continue
            seconds = seconds_of(run_of(setup, name, seed, rate))
            found.setdefault(name, Measured(rate, {}, [])).scores[seed] = scores
            found[name].seconds.append(seconds)
            print(f"{name}, seed {seed}: {statistics.mean(scores.match):.1%} match, {seconds:.0f} s", flush=True)
    return found


def explained(setup: Setup, args: Args) -> str:
    """What the table shows."""
    sizes = setup.sizes
    count = sum(leaf.size for leaf in jax.tree.leaves(setup.base.params))
    return (
        f"One base of {count / 1e6:.2f}M parameters for all arms and seeds, {sizes.base_steps} steps of 2,016 tokens "
        f"of plain molecules. {sizes.num_future - 1} heads, {sizes.heads_steps} steps on molecules drawn by the base, "
        f"{seconds_of(args.out / 'heads'):.0f} s. {sizes.pairs} pairs, {sizes.epochs} epochs, {args.seeds} seeds, "
        f"{sizes.prompts} held-out prompts, {sizes.draws} answers each at temperature {TEMPERATURE}. match: share of "
        "answers with all properties that the prompt asks for. units right: functional groups and rings of several "
        "tokens in the true answers, with every token right given the true tokens before it. tokens per round: greedy "
        "answers, with drafts of the run's heads or of phase 1. seconds: steps times the time of a step where it was "
        "shortest over all seeds, because other processes shared the cores. Differences with 95 % intervals of a "
        "paired bootstrap over seeds and prompts."
    )


def main() -> None:
    """Trains, scores and publishes."""
    args = tyro.cli(Args, description=__doc__)
    sizes = TINY if args.tiny else args.sizes
    setup = prepare(args, sizes)
    found = measure(setup, args)
    untuned = setup.out / "untuned.json"
    if not untuned.exists():
        untuned.write_text(json.dumps(scores_of(setup, setup.heads)._asdict()), encoding="utf-8")
    found[UNTUNED] = Measured(0.0, {0: Scores(**json.loads(untuned.read_text(encoding="utf-8")))}, [])
    note = f"{explained(setup, args)} {claims(found)}"
    rows = [line(found, name) for name in found]
    title = "Fine-tuning: next-token loss, CAFT and naive multi-token loss"
    Report(title, COLUMNS, rows, note).publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
