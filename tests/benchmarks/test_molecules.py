"""The fine-tuning benchmark: its task, its scores and its intervals, and the script as a whole at tiny sizes."""

import pathlib
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Scripts import one another from their own directory."""
    pytest.importorskip("rdkit")
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def tokenizer():
    from mtp_jax.data.tokenize import train_bpe

    return train_bpe(["CC(=O)Nc1ccccc1", "CC(=O)NCc1ccncc1"], 270)


@pytest.mark.parametrize(
    ("smiles", "description"),
    [
        ("CC(=O)Nc1ccc(F)cc1", "1.C(=O)N.CF>"),
        ("COc1ccccc1C#N", "1.C#N.COC>"),
        ("CC(=O)Oc1ccccc1", "1.C(=O)O>"),
        ("NS(=O)(=O)c1cccs1", "1.S(=O)=O.csc>"),
        ("CCO", "0>"),
        ("c1ccccc", None),
        ("", None),
    ],
)
def test_descriptions_of_molecules(smiles, description):
    """describe(molecule) = rings and groups. An ester has no ether's oxygen. Broken text is no molecule.

    Breaks if a count or a pattern changes.
    """
    from molecules import describe

    assert describe(smiles) == description


def test_a_description_does_not_depend_on_how_the_molecule_is_written():
    """describe(a) = describe(b) for two spellings of one molecule. Breaks if the text is matched in place of atoms."""
    from molecules import describe

    assert describe("O=C(C)NC1=CC=C(F)C=C1") == describe("CC(=O)Nc1ccc(F)cc1")


def test_rows_learn_the_answer_and_its_end_only(tokenizer):
    """tokens = prompt + answer + end + padding, and the weight is 1 exactly on answer and end.

    Breaks if the prompt is learned, if the end is not, or if padding is.
    """
    from molecules import Pair, rows_of

    rows = rows_of([Pair("1.CF>", "CCO"), Pair("0>", "CC(=O)NC")], tokenizer, 24)
    for row, (prompt, answer) in enumerate([("1.CF>", "CCO"), ("0>", "CC(=O)NC")]):
        learned = rows.answer_BT[row].astype(bool)
        assert rows.tokens_BT[row, learned].tolist() == [*tokenizer.encode(answer), tokenizer.eos_id]
        assert rows.tokens_BT[row, : rows.starts_B[row]].tolist() == tokenizer.encode_prompt(prompt)
        assert learned.argmax() == rows.starts_B[row]
        assert (rows.tokens_BT[row, rows.starts_B[row] + learned.sum() :] == tokenizer.eos_id).all()


def test_units_are_the_tokens_with_a_character_of_the_unit(tokenizer):
    """The text of the tokens of a unit contains the unit, and without its first or last token it does not.

    Breaks if a span is shifted or too wide.
    """
    from molecules import UNITS, units_of

    answer = "CC(=O)NCc1ccccc1"
    ids = tokenizer.encode(answer)
    spans = units_of(answer, tokenizer)
    assert len(spans) == 2
    for one in spans:
        whole = tokenizer.decode(ids[one.start : one.stop])
        unit = max((unit for unit in UNITS if unit in whole), key=len)
        assert unit not in tokenizer.decode(ids[one.start + 1 : one.stop])
        assert unit not in tokenizer.decode(ids[one.start : one.stop - 1])


def test_interval_of_equal_models_is_zero_and_of_a_constant_gain_is_that_gain():
    """ratio_interval(x, x) = 0 and ratio_interval(x + c, x) = c, with no width: both sides have the same resamples.

    Breaks if seeds or prompts are drawn apart for the two models.
    """
    from molecule_scores import ratio_interval

    rng = np.random.default_rng(0)
    values = rng.random((3, 50))
    ones = np.ones_like(values)
    assert ratio_interval((values, ones), (values, ones)) == (0, 0, 0)
    assert ratio_interval((values + 0.25, ones), (values, ones)) == pytest.approx((0.25, 0.25, 0.25))


def test_interval_has_the_width_of_the_standard_error():
    """For independent prompts and equal seeds, the interval is mean +- 1.96 sd / sqrt(prompts).

    Breaks if fewer or more prompts are drawn than there are.
    """
    from molecule_scores import ratio_interval

    gain = np.random.default_rng(1).normal(0.5, 1, 900)
    values = np.tile(gain, (4, 1))
    zeros = np.zeros_like(values)
    ones = np.ones_like(values)
    found = ratio_interval((values, ones), (zeros, ones))
    half = 1.96 * gain.std() / 30
    assert found.value == pytest.approx(gain.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)


def test_interval_grows_if_seeds_differ():
    """With prompts that are all alike, the spread of seeds alone makes the interval. Breaks if seeds are not drawn."""
    from molecule_scores import ratio_interval

    values = np.repeat([[0.0], [0.5], [1.0]], 20, axis=1)
    ones = np.ones_like(values)
    found = ratio_interval((values, ones), (np.zeros_like(values), ones))
    assert (found.low, found.high) == (0, 1)


@pytest.mark.slow
def test_the_script_runs_and_continues(tmp_path, monkeypatch, capsys):
    """A second call trains nothing and gives the same table. Breaks if a run or a score is not found again."""
    import fine_tuning

    molecules = tmp_path / "molecules.txt"
    rings = ("c1ccccc1", "c1ccncc1", "C1CCCCC1", "c1cccs1")
    groups = ("C(=O)N", "S(=O)(=O)N", "C#N", "F", "Cl", "OC", "C(=O)OC")
    molecules.write_text("\n".join(f"C{'C' * k}{a}{b}" for a in rings for b in groups for k in range(6)))
    argv = ["fine_tuning.py", str(molecules), "--tiny", "--seeds", "1", "--results", "", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*argv, "--arms", "next-full", "caft-lora"])
    fine_tuning.main()
    first = capsys.readouterr().out
    train = fine_tuning.mtp_jax.train
    steps = []

    def watched(*given):
        result = train(*given)
        steps.append(result.step - result.first_step)
        return result

    monkeypatch.setattr(fine_tuning.mtp_jax, "train", watched)
    fine_tuning.main()
    assert steps == [0, 0]  # base and heads are opened; no run of an arm is
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == table
