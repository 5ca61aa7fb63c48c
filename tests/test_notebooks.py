"""Notebooks run from top to bottom at tiny settings."""

import pathlib

import nbclient
import nbformat
import pytest
from reference.tiny import write_text

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
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


@pytest.mark.grid
@pytest.mark.filterwarnings("default")  # warnings of the Jupyter client are not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    """Every cell runs, the tokens are identical, and three plots are shown."""
    notebook = nbformat.read(path, as_version=4)
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    settings = TINY | {"data.source": str(write_text(tmp_path / "corpus", files=20, words=600))}
    parameters[0].source = f"WORKDIR = {str(tmp_path / 'run')!r}\nOVERRIDES = {settings!r}"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "identical: True" in text
    assert "finished: True" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
