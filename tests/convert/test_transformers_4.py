"""Exports in transformers 4.57 itself, which needs packages of its own: the same logits and the same ids."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from reference import hub
from reference.small_llama import quiet, write

import mtp_jax
from mtp_jax.convert.architectures import ARCHITECTURES
from mtp_jax.convert.tokenizer import load_hub_tokenizer
from mtp_jax.convert.writer import export_model
from mtp_jax.data.tokenize import bytes_tokenizer

pytestmark = pytest.mark.slow

PACKAGES = ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
"""Torch and NumPy are those of the suite, and so is everything else that these need."""
SCRIPT = pathlib.Path(importlib.util.find_spec("reference.transformers_4").origin)
SEEDS = range(4)
TEXTS = ["def return self", "x = 1\n", "ünïcödé"]
REFUSED = {"olmo2": "`rope_scaling`"}
"""What transformers 4 cannot compute at all, and says so: an OLMo 2 with yarn or llama3 stretching."""


@pytest.fixture(scope="module")
def packages():
    """transformers 4 in a folder that goes ahead of the installed one; kept between runs."""
    kept = pathlib.Path(os.environ.get("MTP_JAX_TEST_CACHE", tempfile.gettempdir())) / "mtp_jax_transformers_4"
    target = kept / "-".join(package.replace("==", "-") for package in PACKAGES)
    if not target.is_dir():
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept) as partial:
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", f"{partial}/site"]
            done = subprocess.run([*install, *PACKAGES], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no packages from the index: {done.stderr[-200:]}")
            os.rename(f"{partial}/site", target)
    return target


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Every architecture with a few settings, written as a model of ours, with a tokenizer: logits and ids of 5."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    for kind in ARCHITECTURES:
        for seed in SEEDS:
            model = hub.random_model(hub.awkward(kind, seed), seed)
            source = hub.save(model, root / f"{kind}-{seed}-source")
            lm = mtp_jax.load(source, notify=quiet)
            out = root / f"{kind}-{seed}"
            export_model(dataclasses.replace(lm, origin=None), out, notify=quiet)
            tokens = np.random.default_rng(seed).integers(3, model.config.vocab_size, (2, 40))
            made[out.name] = out, tokens, hub.logits_of(model, tokens, np.ones_like(tokens, bool)), ()
    tokenizer = bytes_tokenizer()
    source = write(root / "small", fields={"vocab_size": 24})
    lm = dataclasses.replace(mtp_jax.load(source, notify=quiet), origin=None, tokenizer=tokenizer)
    export_model(lm, root / "with a tokenizer", notify=quiet)
    tokens = np.arange(24)[None, :]
    made["with a tokenizer"] = root / "with a tokenizer", tokens, np.asarray(lm.logits(tokens)[0]), TEXTS
    return made


@pytest.fixture(scope="module")
def read(exports, packages, tmp_path_factory):
    """What transformers 4 makes of them: logits or a refusal by name, and the ids of texts."""
    root = tmp_path_factory.mktemp("read")
    job = {name: (str(out), tokens.tolist(), list(texts)) for name, (out, tokens, _, texts) in exports.items()}
    (root / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, str(SCRIPT), str(root / "job.json"), str(root / "out.npz")]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(root / "out.npz")), json.loads((root / "ids.json").read_text())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_are_those_of_transformers_5(exports, read, kind, seed, record_property):
    """max |4.57 - 5| <= 1e-4 on rows of 40 tokens. Fails if config.json lacks a field of `spellings.older`."""
    theirs = read[0][f"{kind}-{seed}"]
    out, _, expected, _ = exports[f"{kind}-{seed}"]
    if theirs.dtype.kind == "U":
        scaling = json.loads((out / "config.json").read_text())["rope_scaling"]
        assert scaling["type"] in ("yarn", "llama3") and REFUSED.get(kind, "none") in str(theirs), str(theirs)
        return
    difference = float(np.abs(theirs - expected).max())
    record_property("difference", difference)
    print(f"{kind} seed {seed}: {difference:.1e} of {np.abs(expected).max():.1f}")
    assert difference <= 1e-4 and np.abs(expected).max() > 0.5


def test_a_tokenizer_of_ours_gives_the_same_ids(exports, read):
    """ids(4.57) = ids(5) = ours. Fails if tokenizer_config.json names TokenizersBackend."""
    assert read[0]["with a tokenizer"].dtype.kind == "f", str(read[0]["with a tokenizer"])
    ours = bytes_tokenizer()
    again = load_hub_tokenizer(exports["with a tokenizer"][0])
    expected = [ours.encode_prompt(text) for text in TEXTS]
    assert read[1]["with a tokenizer"] == expected == [again.encode_prompt(text) for text in TEXTS]
