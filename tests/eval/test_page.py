"""The page: every figure of the evaluation, every image that it names, nothing that was not measured."""

import re

import numpy as np
import pytest
from reference.evaluation import without_heads

from mtp_jax.decode.generate import Generation
from mtp_jax.decode.stats import DecodeStats
from mtp_jax.eval.acceptance import Comparison
from mtp_jax.eval.page import head_rows, speed_remark, summary, write_page
from mtp_jax.eval.report import Evaluation
from mtp_jax.losses.mtp import HeadSums

PNG = b"\x89PNG\r\n\x1a\n"
METRICS = [
    {"step": s, "head_loss": (np.array([3, 3.5, 4, 4.2]) + 2 / s).tolist(), "loss": 1.0} for s in range(1, 60)
] + [{"step": 59, "heldout_loss": [3.0] * 4}]


def generated(histogram, seconds):
    """Two rows of nine tokens, by rounds with so many accepted drafts."""
    stats = DecodeStats(histogram, sum(histogram), 18, 16, 0.1, seconds, drafted=3 * sum(histogram), replaced=0)
    return Generation([list(range(9)), list(range(9, 18))], None, ["length"] * 2, stats)


def evaluation():
    """Of four heads over a hundred tokens, written down: a page computes nothing."""
    sums = HeadSums(
        *(
            np.array(row, np.float32)
            for row in ([250, 300, 330, 350], [40, 30, 20, 10], [70, 60, 50, 40], [100, 98, 96, 94], [0, 0, 0, 0])
        )
    )
    decoding = Comparison(
        drafted=generated((3, 2, 1, 2), 0.5), plain=generated((16,), 1.0), drafted_seconds=0.5, plain_seconds=1.0
    )
    samples = (("a prompt", "what came", "what follows"), ("another", "one", "two"))
    return Evaluation(
        sums=sums,
        heldout_bytes=80,
        decoding=decoding,
        distinct=0.75,
        reference_distinct=0.875,
        samples=samples,
    )


def images(page):
    return re.findall(r"!\[[^]]*\]\(([^)]*)\)", page.read_text(encoding="utf-8"))


def rendered(page):
    """Names of the page's images, each of which must be a whole PNG of some size beside it."""
    for name in images(page):
        content = (page.parent / name).read_bytes()
        assert content.startswith(PNG) and content.rstrip(b"\0")[-8:-4] == b"IEND" and len(content) > 5000
    return images(page)


def test_page(tmp_path):
    """Three plots, the table, the heads, the remark on speed and the samples; directories are made."""
    result = evaluation()
    page = write_page(tmp_path / "new" / "eval", "A title", result, METRICS, {"train seconds": "12"})
    assert page == tmp_path / "new" / "eval" / "report.md"
    assert rendered(page) == ["loss_by_head.png", "acceptance.png", "speed.png"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# A title\n")
    for name, value in (summary(result) | {"train seconds": "12"}).items():
        assert f"| {name} | {value} |" in text
    for row in head_rows(result):
        assert f"| {' | '.join(row)} |" in text
    assert speed_remark(result) in text
    for sample in result.samples:
        assert all(f"    {part}" in text for part in sample)


def test_numbers_of_the_page():
    """summary and head_rows format what as_json holds; they compute nothing of their own."""
    result, values = evaluation(), evaluation().as_json()
    shown = summary(result)
    assert shown["held-out bits per byte"] == f"{values['bits_per_byte']:.3f}"
    assert f"{values['tokens_per_round']:.2f}" in " ".join(shown.values())
    assert f"{values['speedup']:.2f}x" in shown.values()
    assert shown["distinct 4-grams, output"] == f"{values['distinct_ratio']:.1%}"
    rows = head_rows(result)
    assert [row[:2] for row in rows] == [("0", "t+1"), ("1", "t+2"), ("2", "t+3"), ("3", "t+4")]
    assert [row[2] for row in rows] == [f"{head['loss']:.3f}" for head in values["heads"]]


@pytest.mark.grid
def test_page_of_a_model_without_extra_heads(tmp_path):
    """No drafts: no acceptance and no speed, and the page says nothing about them."""
    _, result = without_heads()
    metrics = [record | {"head_loss": record["head_loss"][:1]} for record in METRICS[:-1]]
    page = write_page(tmp_path, "Plain", result, metrics, {})
    assert rendered(page) == ["loss_by_head.png"]
    assert "drafted" not in page.read_text(encoding="utf-8")
    assert not (tmp_path / "acceptance.png").exists()


@pytest.mark.parametrize("metrics", [[], [{"step": 1, "heldout_loss": [3.0]}]], ids=["none", "no losses"])
def test_page_without_a_training_record(tmp_path, metrics):
    """`mtp eval` has no metrics of a run: no training plot, all the rest."""
    assert rendered(write_page(tmp_path, "Eval", evaluation(), metrics, {})) == ["acceptance.png", "speed.png"]


@pytest.mark.grid
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_page_of_a_very_short_run(tmp_path, steps):
    """A run of one step still has its plot: the running mean is no wider than the record."""
    page = write_page(tmp_path, "Short", without_heads()[1], METRICS[:steps], {})
    assert rendered(page) == ["loss_by_head.png"]
