"""The commands as a person or a program meets them."""

import json
import os
import pathlib
import re
import signal

import matplotlib.image
import pytest
from reference.tiny import tiny_config, write_text

from mtp_jax.cli import COMMANDS, run
from mtp_jax.config import to_json
from mtp_jax.decode.generate import generate
from mtp_jax.loading import load
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training import loop

OVERRIDES = {
    "model.vocab_size": 264,
    "model.num_layers": 1,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.d_ff": 24,
    "heads.kind": "linear",
    "heads.num_future": 2,
    "data.seq_len": 32,
    "data.tokenizer": "bytes",
    "data.eval_fraction": 0.2,
    "train.steps": 8,
    "train.batch_size": 8,
    "decode.num_prompts": 2,
    "decode.prompt_tokens": 8,
    "decode.max_new_tokens": 16,
}


def flags(**changes):
    return [word for name, value in (OVERRIDES | changes).items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def quickstart(text, tmp_path_factory):
    """A finished quickstart at tiny settings: its workdir and arguments."""
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    small = flags(**{"data.source": text})
    arguments = ["quickstart", "--workdir", str(workdir), "--model", "none", *small, "--json"]
    assert run(arguments) == 0
    return workdir, arguments


@pytest.fixture
def config_file(text, tmp_path):
    path = tmp_path / "config.py"
    small = tiny_config(text, model={"num_layers": 1}, heads={"num_future": 1})
    path.write_text(f"from mtp_jax.config import from_json\nconfig = from_json('''{to_json(small)}''')\n")
    return path


def only_json(capsys):
    """Standard output as exactly one JSON object, strictly read."""
    out = capsys.readouterr().out

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert out.count("\n") == 1
    return json.loads(out, parse_constant=refuse)


def error_line(capsys, arguments):
    """The one line on standard error of a command that must fail with 2 and print nothing else."""
    assert run([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("mtp: error: ")
    assert "Traceback" not in captured.err
    return lines[-1]


def test_quickstart_again_reuses_the_model(quickstart, capsys):
    """Keys of the interface are there, drafted = plain, and the second call trains nothing."""
    workdir, arguments = quickstart
    before = (workdir / "metrics.jsonl").read_bytes()
    assert run(arguments) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    keys = "identical bits_per_byte speedup tokens_per_round accept_at distinct_ratio train_seconds seconds workdir"
    assert set(keys.split()) <= set(result)
    assert result["identical"] is True
    assert len(result["accept_at"]) == 1
    assert "trained already, 8 steps" in captured.err
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_quickstart_leaves_a_workdir(quickstart):
    """Checkpoint, config, tokenizer, metrics, TensorBoard, and a report whose plots have ink on them."""
    workdir, _ = quickstart
    names = "config.json data/tokenizer.json metrics.jsonl checkpoints/8 tensorboard report/report.md"
    assert [name for name in names.split() if not (workdir / name).exists()] == []
    page = (workdir / "report" / "report.md").read_text()
    for name in ("loss_by_head.png", "acceptance.png", "speed.png"):
        assert f"({name})" in page
        pixels = matplotlib.image.imread(workdir / "report" / name)
        assert pixels.shape[1] > 800
        assert 0.002 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.6


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    """Every command explains its options and exits with 0."""
    with pytest.raises(SystemExit) as end:
        run([name, "--help"])
    assert not end.value.code
    assert "usage: mtp" in capsys.readouterr().out


@pytest.mark.grid
def test_train_prints_and_resumes(config_file, tmp_path, capsys):
    """mtp train = Config file + overrides; the second call finds the run finished."""
    arguments = ["train", str(config_file), "--workdir", str(tmp_path / "run"), "--train.steps", "2", "--json"]
    assert run(arguments) == 0
    result = only_json(capsys)
    assert (result["step"], result["finished"]) == (2, True)
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 2]
    assert run(arguments) == 0
    assert "trained already, 2 steps" in capsys.readouterr().err


@pytest.mark.grid
def test_train_that_a_signal_stops_exits_with_it(config_file, tmp_path, capsys, monkeypatch):
    """SIGTERM behind the first step: exit status 128 + 15 and `finished` false, so that a scheduler starts it again."""
    original = loop.place

    def place_and_stop(batch, steps, batch_size):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, steps, batch_size)

    monkeypatch.setattr(loop, "place", place_and_stop)
    with pytest.raises(SystemExit) as end:
        run(["train", str(config_file), "--workdir", str(tmp_path / "run"), "--json"])
    assert end.value.code == 143
    result = only_json(capsys)
    assert (result["step"], result["finished"]) == (1, False)


def test_an_address_is_no_workdir(config_file, capsys):
    """gs://... would become a directory `gs:`. Breaks without the check in `mtp train`."""
    assert "is an address; give a directory" in error_line(capsys, ["train", config_file, "--workdir", "gs://b/run"])


def test_generate_json_is_the_same_with_and_without_drafts(quickstart, capsys):
    """--draft heads = --draft none, token for token, under the keys of the interface."""
    base = ["generate", str(quickstart[0]), "--prompt", "def ", "--max-new-tokens", "24", "--json", "--draft"]
    results = []
    for draft in ("heads", "none"):
        assert run([*base, draft]) == 0
        results.append(only_json(capsys))
    assert results[0]["completions"] == results[1]["completions"]
    assert set(results[0]["completions"][0]) == {"prompt", "text", "tokens", "finish_reason"}
    keys = {"rounds", "emitted", "tokens_per_round", "accept_at", "seconds", "tokens_per_second"}
    assert keys <= set(results[0]["stats"])
    assert results[1]["stats"]["tokens_per_round"] == 1.0


@pytest.mark.grid
def test_generate_samples_the_same_with_any_drafter(quickstart, capsys):
    """The sampling flags reach `generate`; the draw does not depend on --draft or the other prompts."""
    base = ["generate", str(quickstart[0]), "--prompt", "def ", "--max-new-tokens", "16", "--json"]
    base += ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--seed", "7"]
    base += ["--repetition-penalty", "1.1", "--hot-temperature", "1.4", "--hot-entropy", "1.5"]
    ways = [[], ["--draft", "none", "--prompt", "if "]]
    drawn = []
    for way in ways:
        assert run([*base, *way]) == 0
        drawn.append(only_json(capsys)["completions"][0])
    assert drawn[1] == drawn[0]
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 7, "repetition_penalty": 1.1}
    options |= {"hot_temperature": 1.4, "hot_entropy": 1.5}
    lm = load(quickstart[0])
    assert drawn[0]["tokens"] == generate(lm, ["def "], max_new_tokens=16, **options).tokens[0]
    assert run([*base, "--seed", "8"]) == 0
    assert only_json(capsys)["completions"][0] != drawn[0]


@pytest.mark.grid
def test_filters_without_temperature_are_pointed_out(quickstart, capsys):
    """Greedy decoding has no use for a filter; whoever sets one hears so."""
    base = ["generate", str(quickstart[0]), "--prompt", "def ", "--max-new-tokens", "4", "--top-p", "0.9", "--json"]
    assert run(base) == 0
    assert "--top-p has no effect at temperature 0" in capsys.readouterr().err
    assert run([*base, "--temperature", "1"]) == 0
    assert "has no effect" not in capsys.readouterr().err


@pytest.mark.grid
def test_lossy_rules_say_so(quickstart, capsys):
    """A lossy rule is named, with how many tokens are not those of exact decoding; an exact one is not."""
    base = ["generate", str(quickstart[0]), "--prompt", "def ", "--max-new-tokens", "16", "--temperature", "1.0"]
    assert run([*base, "--accept", "typical", "--json"]) == 0
    result = only_json(capsys)
    assert result["lossy"] is True and result["compared"] == 16
    assert (result["differing"] > 0) == (result["stats"]["replaced"] > 0)
    assert run([*base, "--accept", "confidence"]) == 0
    said = r"accept=confidence took \d+ drafts .* of 16 tokens; \d+ of 16 tokens differ from those of accept=exact"
    assert re.search(said, capsys.readouterr().err)
    assert run([*base, "--accept", "exact", "--json"]) == 0
    assert "lossy" not in only_json(capsys)


@pytest.mark.grid
def test_generate_records_and_samples(quickstart, capsys):
    """--n and --logprobs reach `generate`, and the completions have their numbers. Breaks without `_repeated`, or
    without the loop over the three names."""
    base = ["generate", str(quickstart[0]), "--prompt", "def ", "--max-new-tokens", "6", "--temperature", "1"]
    assert run([*base, "--n", "2", "--logprobs", "2", "--json"]) == 0
    found = only_json(capsys)["completions"]
    options = {"max_new_tokens": 6, "temperature": 1.0, "n": 2, "logprobs": 2}
    out = generate(load(quickstart[0]), ["def "], **options)
    assert [one["prompt"] for one in found] == ["def "] * 2
    assert [one["tokens"] for one in found] == out.tokens
    assert [one["logprobs"] for one in found] == out.logprobs
    assert [one["entropies"] for one in found] == out.entropies
    assert [[list(map(tuple, top)) for top in one["top_logprobs"]] for one in found] == out.top_logprobs
    assert run([*base, "--n", "2"]) == 0
    assert capsys.readouterr().out == "def " + "\n---\ndef ".join(out.text) + "\n"


def test_generate_streams_every_prompt(quickstart, tmp_path, capsys):
    """Text of --prompt, --prompt-file and --prompt-tokens on stdout, statistics on stderr."""
    file = tmp_path / "prompt.txt"
    file.write_text("value ")
    prompts = ["--prompt", "def ", "--prompt", "for ", "--prompt-file", str(file), "--prompt-tokens", "105,102"]
    assert run(["generate", str(quickstart[0]), *prompts, "--max-new-tokens", "8"]) == 0
    captured = capsys.readouterr()
    shown = captured.out.split("---\n")
    starts = ("def ", "for ", "value ", "if")
    assert len(shown) == 4
    assert all(text.startswith(start) for text, start in zip(shown, starts, strict=True))
    assert "rounds" in captured.err


@pytest.mark.grid
def test_eval_equals_quickstart(quickstart, text, tmp_path, capsys):
    """mtp eval on the run's own held-out files gives the figures that quickstart printed."""
    workdir, arguments = quickstart
    run(arguments)
    expected = json.loads(capsys.readouterr().out)
    held_out = tmp_path / "heldout"
    held_out.mkdir()
    for name in json.loads((workdir / "data" / "meta.json").read_text())["heldout_documents"]:
        (held_out / pathlib.Path(name).name).write_bytes((text / name).read_bytes())
    marginals = ["--marginalise", "3", "--marginal-positions", "9"]
    out = str(tmp_path / "out")
    assert run(["eval", str(workdir), "--data", str(held_out), "--json", "--output", out, *marginals]) == 0
    result = only_json(capsys)
    assert [(one["offset"], one["positions"]) for one in result["marginals"]] == [(2, 9)]
    assert "## Heads and marginals" in (tmp_path / "out" / "report.md").read_text()
    assert result["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=0.02)
    assert {"loss", "top1", "top5"} == set(result["heads"][0])
    assert {"tokens_per_round", "accept_at", "distinct_ratio"} <= set(result)
    assert (tmp_path / "out" / "report.md").exists()


@pytest.mark.grid
def test_eval_compares(quickstart, text, tmp_path, capsys):
    """Two names of one run on two kinds of text: every paired difference but that of the clock is 0, and the heads are
    those of a single evaluation."""
    other = tmp_path / "other"
    other.symlink_to(quickstart[0])
    command = ["eval", str(quickstart[0]), str(other), "--data", f"all={text}", "--data", f"first={text / '00.txt'}"]
    options = ["--spans", "re[a-z]+", "--num-prompts", "2", "--max-new-tokens", "6", "--output", str(tmp_path / "out")]
    assert run([*command, *options, "--json"]) == 0
    result = only_json(capsys)
    assert [one["name"] for one in result["models"]] == [str(quickstart[0]), str(other)]
    apart = result["differences"][0]["kinds"]
    assert set(apart) == {"all", "first"}
    assert {one["value"] for name, one in apart["all"].items() if name != "measured gain"} <= {0, None}
    assert apart["all"]["loss, head 1"]["value"] == 0
    assert "spans: bits per character" in apart["all"] and (tmp_path / "out" / "comparison.md").exists()
    assert run(["eval", str(quickstart[0]), "--data", str(text), "--json", "--output", str(tmp_path / "one")]) == 0
    single = only_json(capsys)
    heads = result["models"][0]["kinds"]["all"]["heads"]
    assert [one["loss"]["value"] for one in heads] == pytest.approx([one["loss"] for one in single["heads"]])
    assert {"tf_accept_at", "controls", "controls_fail", "intervals"} <= set(single)


@pytest.mark.grid
def test_eval_answers_a_task(quickstart, tmp_path, capsys):
    """One JSON object with the accuracy; a second call reads the answers of the first."""
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "def ", "answer": "[a-z]"}\n{"prompt": "for ", "answer": "[0-9]{99}"}\n')
    command = ["eval", str(quickstart[0]), "--task", str(task), "--checker", "regex", "--max-new-tokens", "8"]
    command += ["--output", str(tmp_path), "--json"]
    assert run(command) == 0
    result = only_json(capsys)
    assert (result["accuracy"]["value"], result["questions"], result["wrong"]) == (0.5, 2, {"wrong": 1})
    assert run(command) == 0 and only_json(capsys) == result


@pytest.mark.grid
def test_bench_decode(quickstart, capsys):
    """Both sides and the floor, with the keys of the interface; a step cannot beat twice its floor's bandwidth."""
    arguments = ["bench", "decode", str(quickstart[0]), "--max-new-tokens", "16", "--prompt-tokens", "8", "--runs", "1"]
    assert run([*arguments, "--json"]) == 0
    result = only_json(capsys)
    assert {"ms_per_step", "floor_ms", "tokens_per_second"} <= set(result["plain"])
    assert {"ms_per_round", "tokens_per_round", "tokens_per_second"} <= set(result["draft"])
    assert result["identical"] is True
    assert result["plain"]["ms_per_step"] * result["plain"]["tokens_per_second"] == pytest.approx(1e3)
    draft = result["draft"]
    assert draft["draft_share"] == pytest.approx(max(0, 1 - draft["verify_ms"] / draft["ms_per_round"]))
    assert result["mismatches"] == {"rate": 0.0, "parted_rows": 0, "within_margin": 0, "rows": 1}
    assert run([*arguments, "--draft", "lookup", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "4 drafts of lookup, bfloat16" in printed
    assert re.search(r"tokens (identical|.* of 1 rows DIFFER)", printed)


BAD = {
    "no command": (["dance"], r"there is no command 'dance'; choose one of quickstart, accelerate, train"),
    "unknown key": (["train", "CONFIG", "--model.d_modl", 3], r"--model.d_modl.* Perhaps you meant.*--model.d.model"),
    "wrong type": (["train", "CONFIG", "--train.steps", "many"], r"--train.steps.*'many'"),
    "indivisible": (["train", "CONFIG", "--model.num_heads", 3], r"model.num_heads=3 .* model.num_kv_heads=2"),
    "M above the row": (["train", "CONFIG", "--heads.num_future", 40], r"heads.num_future=40 .* data.seq_len=32"),
    "no config": (["train", "nowhere.py"], r"config file nowhere.py does not exist"),
    "a directory for a config": (["train", "."], r"config file \. is a directory"),
    "no config given": (["train"], r"needs a config file"),
    "missing corpus": (["train", "CONFIG", "--data.source", "/nowhere"], r"/nowhere"),
    "small vocabulary": (["train", "CONFIG", "--model.vocab_size", 100], r"258.*100|100.*258"),
    "not a run": (["generate", "/nowhere", "--prompt", "x"], r"/nowhere is not a directory"),
    "nothing to continue": (["generate", "RUN"], r"there is no prompt"),
    "empty prompt": (["generate", "RUN", "--prompt", ""], r"prompt 0 is empty"),
    "bad ids": (["generate", "RUN", "--prompt-tokens", "1,x"], r"'1,x' is not a list of ids"),
    "id outside": (["generate", "RUN", "--prompt-tokens", "1,999"], r"token id 999; the vocabulary is 0..263"),
    "long prompt": (["generate", "RUN", "--prompt", "x" * 4000], r"has 4001 tokens; .*max_seq_len"),
    "too many drafts": (["generate", "RUN", "--prompt", "x", "--num-draft", 9], r"num_draft=9.* 1 extra heads"),
    "no tokens": (["generate", "RUN", "--prompt", "x", "--max-new-tokens", 0], r"max_new_tokens=0"),
    "no data": (["eval", "RUN", "--data", "/nowhere"], r"/nowhere"),
    "K above V": (["eval", "RUN", "--data", "/nowhere", "--marginalise", 265], r"--marginalise 265.* 1 to 264"),
    "positions of nothing": (["eval", "RUN", "--data", "x", "--marginal-positions", 5], r"--marginalise 0: give"),
    "marginals of two": (["eval", "RUN", "RUN", "--data", "x", "--marginalise", 5], r"is for one model on one text"),
    "nothing to evaluate on": (["eval", "RUN"], r"give --data TEXT, or --task"),
    "no model": (["eval", "--data", "x"], r"mtp eval needs a model"),
    "a model twice": (["eval", "RUN", "RUN", "--data", "x"], r"a model is named twice"),
    "no span": (["eval", "RUN", "--data", "TEXT", "--spans", "[0-9]{99}"], r"--spans: nothing in .* matches"),
    "no expression": (["eval", "RUN", "--data", "TEXT", "--spans", "("], r"--spans '\(' is no regular expression"),
    "no checker": (["eval", "RUN", "--task", "t.jsonl"], r"--task needs --checker"),
    "unknown checker": (
        ["eval", "RUN", "--task", "t", "--checker", "bleu"],
        r"unknown checker 'bleu'; choose one of exact",
    ),
    "a broken task": (["eval", "RUN", "--task", "TASK", "--checker", "exact"], r"--task .*, line 2: it is not JSON"),
    "an idle option": (
        ["eval", "RUN", "--data", "x", "--samples", 2],
        r"--samples needs --task FILE.jsonl; leave it out",
    ),
    "equal samples": (
        ["eval", "RUN", "--task", "t", "--checker", "exact", "--samples", 2],
        r"at temperature 0 gives equal",
    ),
    "no filter": (["generate", "RUN", "--prompt", "x", "--top-p", 0], r"top_p=0.0; it must be above 0, at most 1"),
    "cold": (["generate", "RUN", "--prompt", "x", "--temperature", -1], r"temperature=-1.0; it must be 0 for greedy"),
    "hot but greedy": (
        ["generate", "RUN", "--prompt", "x", "--hot-temperature", 2, "--hot-entropy", 1],
        r"hot_temperature=2.0 at temperature 0, which draws nothing",
    ),
    "records as text": (["generate", "RUN", "--prompt", "x", "--logprobs", 1], r"--logprobs 1 needs --json"),
    "too many": (["generate", "RUN", "--prompt", "x", "--logprobs", 265, "--json"], r"logprobs=265, but .* 264 tokens"),
    "same samples": (["generate", "RUN", "--prompt", "x", "--n", 2], r"n=2 samples at temperature 0 would all be"),
    "drafts in words": (["generate", "RUN", "--prompt", "x", "--num-draft", "many"], r"--num-draft many is neither"),
    "nothing to compare": (["bench", "decode", "RUN", "--num-draft", 0], r"there are no drafts to measure"),
    "no benchmark": (["bench", "coffee"], r"what to measure is one of decode, loss, train"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, quickstart, config_file, text, tmp_path, capsys):
    """Bad input ends with status 2 and one line that names the thing and the value."""
    arguments, message = BAD[case]
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "a", "answer": "b"}\n{\n')
    names = {"CONFIG": str(config_file), "RUN": str(quickstart[0]), "TEXT": str(text), "TASK": str(task)}
    arguments = [names.get(argument, argument) for argument in arguments]
    if arguments[0] == "train" and len(arguments) > 2:
        arguments += ["--workdir", str(tmp_path / "run")]
    assert re.search(message, error_line(capsys, arguments))


def test_bad_corpora(config_file, tmp_path, capsys):
    """Empty and non-UTF-8 corpora are named, with the file and the byte."""
    empty, latin = tmp_path / "empty", tmp_path / "latin"
    empty.mkdir()
    latin.mkdir()
    (latin / "a.txt").write_bytes(b"caf\xe9 " * 50)
    for source, message in ((empty, "empty"), (latin, "a.txt")):
        line = error_line(capsys, ["train", config_file, "--workdir", tmp_path / "run", "--data.source", source])
        assert message in line


def test_config_file_errors_are_one_line(tmp_path, capsys):
    """A config that fails, or defines no config, is named with the reason."""
    for code, message in (
        ("1/0", "ZeroDivisionError"),
        ("x = 1", "does not define `config"),
        ("import nope_nope", "nope_nope"),
    ):
        path = tmp_path / "bad.py"
        path.write_text(code)
        assert message in error_line(capsys, ["train", path])
