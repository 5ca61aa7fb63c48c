"""`mtp accelerate` from a GGUF file to its page; and stopped on its way, it ends with the same heads."""

import http.server
import json
import os
import pathlib
import signal
import threading

import jax
import numpy as np
import pytest
from reference import gguf_files, hub

from mtp_jax.accelerate import answers, endpoint, stages
from mtp_jax.accelerate.batches import read_records
from mtp_jax.cli import run
from mtp_jax.loading import load
from mtp_jax.train import loop, states

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

    Breaks if held-out prompts are answered, if `figures.json` is not read, or without `check_same`.
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
    assert "was begun with --seq-len 16, not 17; use another WORKDIR" in capsys.readouterr().err


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

    def do_GET(self):
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
    assert error.startswith("mtp: error: --endpoint: http://127.0.0.1:9/v1/models cannot be asked")
    assert pathlib.Path(tmp_path / "work" / "prompts.jsonl").is_file()
