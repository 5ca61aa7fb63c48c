"""`mtp accelerate` from a GGUF file to its page; and stopped on its way, it ends with the same heads."""

import http.server
import json
import os
import signal
import threading
import types

import jax
import numpy as np
import pytest
from reference import gguf_files, hub

from mtp_jax.accelerate import answers, endpoint, stages
from mtp_jax.accelerate.batches import read_records
from mtp_jax.accelerate.plan import HeadTraining
from mtp_jax.cli import run
from mtp_jax.convert.importer import import_model
from mtp_jax.decode.memory import CacheTooLarge
from mtp_jax.errors import UserError
from mtp_jax.loading import load
from mtp_jax.training import loop, states

PROMPTS = ["abc abc", "abd", "abcabcabc", "abe abc", "eee bcd", "cde ecd", "a b c d", "dcba dcba"]
SMALL = {
    "steps": 3,
    "answer_tokens": 6,
    "seq_len": 16,
    "batch_size": 2,
    "heldout": 1,
    "kind": "linear",
    "num_future": 2,
    "library": 0,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = hub.random_model(gguf_files.small("llama"))
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "model.gguf", model)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(answers, "BATCH", 4)
    monkeypatch.setattr(endpoint, "BATCH", 4)
    monkeypatch.setattr(states, "ROWS", 2)
    monkeypatch.setattr(stages, "NEW_TOKENS", 4)


def command(source, workdir, prompts, **changes):
    options = {"prompts": prompts, **SMALL, **changes}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["accelerate", str(source), str(workdir), *words, "--json"]


@pytest.fixture(scope="module")
def whole(source, prompts, tmp_path_factory):
    """A run that nothing stopped: its workdir."""
    workdir = tmp_path_factory.mktemp("whole") / "work"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "BATCH", 4)
        patch.setattr(states, "ROWS", 2)
        patch.setattr(stages, "NEW_TOKENS", 4)
        assert run(command(source, workdir, prompts)) == 0
    return workdir


def parameters(workdir):
    return load(workdir / "heads").params


@pytest.mark.grid
def test_to_its_page(whole, source, prompts, capsys):
    """The page names every side and image; the heads learned from every answer but those held out, and the model is
    what it was. Run again, it decodes nothing anew and prints the same figures; other settings are refused by name.

    Breaks if held-out prompts are answered, if `figures.json` is not read, or without `plan.changed`.
    """
    page = whole / "report" / "report.md"
    text = page.read_text()
    for name in ("plain", "lookup", "heads", "heads+lookup, auto", "gain.png", "acceptance.png", "loss_by_head.png"):
        assert name in text
    assert all((page.parent / f"{name}.png").read_bytes()[-8:-4] == b"IEND" for name in ("gain", "loss_by_head"))
    told = read_records(whole / "text.jsonl")
    assert 4 <= len(told) < len(PROMPTS)  # one is held out; an answer may be blank
    held = read_records(whole / "prompts.jsonl")[0]["messages"][0]["content"]
    assert held not in {one["messages"][0]["content"] for one in told}
    before = load(source).params
    for name in ("blocks", "embed"):
        jax.tree.map(np.testing.assert_array_equal, parameters(whole)[name], before[name])
    assert run(command(source, whole, prompts)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finished"] and found["results"] == json.loads((whole / "figures.json").read_text())
    assert run(command(source, whole, prompts, seq_len=17)) == 2
    assert "was started with --seq-len 16, not 17; use another WORKDIR" in capsys.readouterr().err


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.grid
def test_stopped_three_times_it_ends_with_the_same_heads(whole, source, prompts, tmp_path, monkeypatch):
    """Killed behind the first answers, behind the first states, and stopped in the second step, it ends with the heads
    of the run that nothing stopped, bit for bit.

    Breaks if `make` draws on what ran before it, or `run_batches` does a batch again in another way.
    """
    workdir = tmp_path / "work"
    for module, name, times in ((answers, "generate", 1), (states, "_file_of", 1)):
        with monkeypatch.context() as patch:
            kill_behind(patch, module, name, times)
            with pytest.raises(Killed):
                run(command(source, workdir, prompts))
    assert len(list((workdir / "answers").glob("*.jsonl"))) == 2
    assert len(list((workdir / "heads" / "states").glob("*.npy"))) == 1
    with monkeypatch.context() as patch:
        original, count = loop.place, iter(range(9))

        def place(*args):
            if next(count) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        patch.setattr(loop, "place", place)
        with pytest.raises(SystemExit) as end:
            run(command(source, workdir, prompts))
        assert end.value.code == 128 + signal.SIGTERM
    assert run(command(source, workdir, prompts)) == 0
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(whole))


def kill_behind(patch, module, name, times):
    original, calls = getattr(module, name), iter(range(99))

    def dies(*args, **options):
        if next(calls) == times:
            raise Killed
        return original(*args, **options)

    patch.setattr(module, name, dies)


class Server(http.server.BaseHTTPRequestHandler):
    """Answers what was asked in capitals; long ones are cut off."""

    def log_message(self, *args):
        pass

    busy = 0

    def do_GET(self):
        if type(self).busy:
            type(self).busy -= 1
            self.send_error(429)
            return
        self.answer({"data": [{"id": "m"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "m" and body["max_tokens"] == 6
        if self.path == "/v1/completions":
            choice = {"text": body["prompt"].upper(), "finish_reason": "length"}
        else:
            said = body["messages"][-1]["content"].upper()
            choice = {"message": {"content": said}, "finish_reason": "stop"}
        self.answer({"choices": [choice]})

    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}/v1"
        made.shutdown()


def test_answers_of_a_server(server, source, tmp_path):
    """The answers are the server's, in the order of the prompts; cut ones are told from whole ones.

    Breaks if text goes to the address of chats, or `finish_reason` is not read.
    """
    lm = load(source)
    given = [{"kind": "a", "text": "abc"}, {"kind": "b", "messages": [{"role": "user", "content": "bcd"}]}]
    made = endpoint.make_answers(server, lm, given, 6, 0, tmp_path / "answers", lambda line: None)
    assert [one["completion"] if "completion" in one else one["messages"][-1]["content"] for one in made] == [
        "ABC",
        "BCD",
    ]
    assert [one["finished"] for one in made] == [False, True]


@pytest.mark.grid
def test_a_server_that_is_not_there(source, tmp_path, prompts, capsys):
    """One line says whom it asked; nothing that was made is lost.

    Breaks without `except OSError` in `_call`.
    """
    options = {"endpoint": "http://127.0.0.1:9/v1"}
    assert run(command(source, tmp_path / "work", prompts, **options)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mtp: error: --endpoint: the request to http://127.0.0.1:9/v1/models failed: ")
    made = (tmp_path / "work" / "prompts.jsonl").read_bytes()
    # Without it, as the line says, the same workdir goes on from the same prompts.
    assert run(command(source, tmp_path / "work", prompts)) == 0
    assert (tmp_path / "work" / "prompts.jsonl").read_bytes() == made


@pytest.mark.parametrize("url", ["http://127.0.0.1:80a0/v1", "no-scheme/v1"])
def test_an_address_that_is_none(url):
    """One line. Breaks if the request is made outside of `try`, or without `HTTPException`."""
    with pytest.raises(UserError, match=r"^--endpoint: the request to .* failed: .*; start the server, or"):
        endpoint._call(f"{url}/models", None)


def test_a_busy_server_is_asked_again(server, monkeypatch):
    """429 twice, then the answer. Breaks without `WAITS`."""
    monkeypatch.setattr(endpoint, "WAITS", (0, 0))
    monkeypatch.setattr(Server, "busy", 2)
    assert endpoint._model(server) == "m"
    monkeypatch.setattr(Server, "busy", 3)
    with pytest.raises(UserError, match="answers with status 429"):
        endpoint._model(server)


def test_silence_is_no_batch(server, source, tmp_path):
    """A batch without any answer is refused and not written. Breaks without the refusal: a rerun would never ask."""
    given = [{"kind": "a", "text": " "}]
    with pytest.raises(UserError, match=r"gave empty answers to 1 prompts"):
        endpoint.make_answers(server, load(source), given, 6, 0, tmp_path / "answers", lambda line: None)
    assert not list((tmp_path / "answers").iterdir())


def test_a_directory_with_other_things(source, prompts, tmp_path, capsys):
    """A user's own prompts.jsonl in WORKDIR is not taken for ours, and a file for WORKDIR is called one.

    Breaks without `RESULTS`, or `NotADirectoryError`.
    """
    workdir = tmp_path / "work"
    workdir.mkdir()
    (workdir / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert run(command(source, workdir, prompts)) == 2
    assert "holds prompts.jsonl but no plan.json" in capsys.readouterr().err
    assert [path.name for path in workdir.iterdir() if path.name != "compiled"] == ["prompts.jsonl"]
    assert run(command(source, workdir / "prompts.jsonl", prompts)) == 2
    assert "prompts.jsonl is a file; give a directory for WORKDIR" in capsys.readouterr().err


def test_settings_of_the_model_mean_nothing_to_its_heads(source, tmp_path):
    """A run whose loss and heads were of another kind gives the heads that were asked for.

    Breaks without `_fresh` for either.
    """
    trunk = tmp_path / "trunk"
    import_model(str(source), trunk, notify=lambda line: None)
    config = json.loads((trunk / "config.json").read_text())
    config["loss"]["token_order"], config["data"]["prompt_tokens"] = 0.5, 3
    config["heads"]["num_future"], config["heads"]["tap_mix"] = 3, True
    (trunk / "config.json").write_text(json.dumps(config))
    heads = stages.heads_config(trunk, tmp_path / "text.jsonl", HeadTraining(kind="linear", num_future=2))
    assert heads.loss.token_order == 0 and heads.data.prompt_tokens == 0 and not heads.heads.tap_mix


def test_a_batch_too_large_is_halved(monkeypatch):
    """Answers come in the order of the prompts, each with its own seed.

    Breaks if a half gets the seeds of the other.
    """

    def generate(lm, prompts, *, seed, **options):
        if len(prompts) > 2:
            raise CacheTooLarge("no")
        said = [f"{prompt}{one}" for prompt, one in zip(prompts, seed, strict=True)]
        return types.SimpleNamespace(text=said, tokens=[[1]] * len(said), finish_reason=["eos"] * len(said))

    monkeypatch.setattr(answers, "generate", generate)
    found = answers._answers(None, ["a", "b", "c", "d", "e"], [1, 2, 3, 4, 5])
    assert [one.text for one in found] == ["a1", "b2", "c3", "d4", "e5"]
    monkeypatch.setattr(answers, "generate", lambda *args, **options: generate(None, ["too", "many", "rows"], seed=[]))
    with pytest.raises(CacheTooLarge):
        answers._answers(None, ["a"], [1])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"heldout": 0}, "heldout=0; it must be at least 1"),
        ({"minutes": 0}, "minutes=0; it must be above 0"),
        ({"kind": "medusa", "attention": True}, "attention=True has no effect on kind='medusa'"),
        ({"kind": "registers"}, "kind='registers' heads cannot draft"),
        ({"kind": "odd"}, "kind='odd' is not a head family"),
    ],
)
def test_settings_that_cannot_work(fields, says):
    """Settings are refused when they are made, from Python as from the command line. Breaks without the check."""
    with pytest.raises(UserError, match=says):
        HeadTraining(**fields)
