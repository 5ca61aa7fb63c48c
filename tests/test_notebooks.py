"""Notebooks run from top to bottom at tiny settings."""

import ast
import pathlib
import re

import nbclient
import nbformat
import pytest
from reference import gguf_files, hub
from reference.chat_task import tiny, write_chats
from reference.tiny import write_text

import mtp_jax
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
TINY = {
    "model.vocab_size": 300,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.d_ff": 24,
    "data.seq_len": 32,
    "data.eval_fraction": 0.2,
    "train.steps": 10,
    "train.batch_size": 8,
    "decode.num_prompts": 2,
    "decode.prompt_tokens": 8,
    "decode.max_new_tokens": 16,
}


def executed(path, parameters):
    """A notebook's outputs, its cell of parameters replaced."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1
    cells[0].source = parameters
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs), images


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_use_public_names(path):
    """Of the package a notebook imports `mtp_jax` alone, and every attribute that it takes is public. Breaks with an
    import of a module inside the package."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    code = "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith("%"))
    tree = ast.parse(code)
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name.startswith("mtp_jax")} == {"mtp_jax"}
    assert set(re.findall(r"\bmtp_jax\.(\w+)", code)) <= set(mtp_jax.__all__)


@pytest.mark.grid
@pytest.mark.filterwarnings("default")  # warnings of the Jupyter client are not ours
def test_train_and_decode(tmp_path):
    """Every cell runs, the tokens are identical, and three plots are shown."""
    settings = TINY | {"data.source": str(write_text(tmp_path / "corpus", files=20, words=600))}
    parameters = f"WORKDIR = {str(tmp_path / 'run')!r}\nOVERRIDES = {settings!r}"
    text, images = executed(NOTEBOOKS / "01_train_and_decode.ipynb", parameters)
    assert "identical: True" in text
    assert "finished: True" in text
    assert images == 3


@pytest.mark.grid
@pytest.mark.filterwarnings("default")
def test_make_a_checkpoint_faster(tmp_path):
    """Every cell runs on a small GGUF file, the tokens are identical, and three plots are shown."""
    source = gguf_files.write(tmp_path / "model.gguf", hub.random_model(gguf_files.small("llama")))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc abc\nabd\nabcabcabc\nabe abc\neee bcd\n")
    settings = {"prompts": str(prompts), "steps": 2, "answer_tokens": 6, "seq_len": 16, "batch_size": 2, "heldout": 1}
    settings |= {"kind": "linear", "num_future": 2, "library": 0.0}
    parameters = f"SOURCE = {str(source)!r}\nWORKDIR = {str(tmp_path / 'run')!r}\nSETTINGS = {settings!r}"
    text, images = executed(NOTEBOOKS / "02_make_a_checkpoint_faster.ipynb", parameters)
    assert "identical: True" in text
    assert "finished: True" in text
    assert images == 3


@pytest.mark.grid
@pytest.mark.filterwarnings("default")
def test_fine_tune_with_caft(tmp_path):
    """Every cell runs on a tiny chat model, and the tokens with and without drafts are identical."""
    task = write_chats(tmp_path / "task.jsonl", 30)
    off = {"train__init_from": "", "train__patience": 0, "optim__learning_rate": 1e-2, "train__steps": 20}
    with RunConsole(quiet=True) as console:
        train(tiny("next_token_full", data__source=str(task), **off), tmp_path / "model", console)
    steps = {"steps": 4, "batch_size": 4, "eval_every": 2, "patience": 2}
    settings = {"SOURCE": str(tmp_path / "model"), "TASK": str(task), "WORKDIR": str(tmp_path / "run")}
    settings |= {"ANSWER_TOKENS": 12, "HEADS": steps, "FINE_TUNE": steps, "DATA": {"seq_len": 48}}
    settings |= {"LORA": {"rank": 2}}
    parameters = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    text, _ = executed(NOTEBOOKS / "03_fine_tune_with_caft.ipynb", parameters)
    assert "identical: True" in text
    assert re.search(r"caft: held-out next-token loss \d", text)


@pytest.mark.grid
@pytest.mark.filterwarnings("default")
def test_reinforce(tmp_path):
    """Every cell runs on a tiny model, both runs finish, tokens with and without drafts are identical, and a plot is
    shown."""
    model = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "d_ff": 24}
    small = {f"model.{name}": value for name, value in model.items()} | {"heads.num_future": 2}
    learn = small | {"data.source": "synthetic:arithmetic:documents=400", "train.steps": 4, "train.batch_size": 4}
    reinforce = {"train.steps": 2, "train.batch_size": 4, "train.eval_every": 1, "data.seq_len": 24}
    reinforce |= {"rl.prompts": 2, "rl.samples": 2, "rl.updates": 1, "rl.max_new_tokens": 12}
    reinforce |= {"rl.eval_prompts": 2, "rl.eval_samples": 2}
    settings = {"WORKDIR": str(tmp_path), "LEARN": learn, "REINFORCE": reinforce}
    text, images = executed(
        NOTEBOOKS / "04_reinforce.ipynb", "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    )
    assert text.count("finished: True") == 2 and "identical: True" in text
    assert "before: greedy" in text and "after: greedy" in text
    assert images == 1
