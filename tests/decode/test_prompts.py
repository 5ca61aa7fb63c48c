"""Prompts as tokenizers return them are the prompts of their token ids."""

import types

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from mtp_jax.config import Arch, ModelConfig
from mtp_jax.decode.prompts import prompt_ids, rows_of
from mtp_jax.errors import UserError

MODEL = types.SimpleNamespace(tokenizer=None, arch=Arch(ModelConfig(vocab_size=100)))
IDS = [3, 1, 4, 1, 5]


@pytest.mark.parametrize(
    "prompt",
    [
        *(IDS, tuple(IDS), np.array(IDS), torch.tensor(IDS)),
        *([IDS], np.array([IDS]), torch.tensor([IDS])),
        *({"input_ids": IDS}, {"input_ids": [IDS], "attention_mask": [[1] * 5]}, {"input_ids": torch.tensor([IDS])}),
        *(BatchEncoding({"input_ids": IDS, "attention_mask": [1] * 5}), BatchEncoding({"input_ids": np.array([IDS])})),
        *({"input_ids": [[0, 0, *IDS]], "attention_mask": [[0, 0, 1, 1, 1, 1, 1]]},),
        {"input_ids": torch.tensor([[*IDS, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])},
    ],
    ids=str,
)
def test_one_prompt(prompt):
    """ids(prompt) = the ids, in a list, an array, a tensor, in rows or not, with or without names and padding. Breaks
    without `_one_row`, or without the mask in `rows_of`."""
    assert prompt_ids(MODEL, prompt, 0) == IDS


def test_a_batch_as_the_prompts():
    """What a tokenizer returns for several texts is as many prompts, without their padding."""
    batch = BatchEncoding({"input_ids": [[0, 1, 2], [3, 4, 5]], "attention_mask": [[0, 1, 1], [1, 1, 1]]})
    assert rows_of(batch) == [[1, 2], [3, 4, 5]]
    assert rows_of({"input_ids": IDS}) == [IDS]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"text": "a"}, "a prompt that is a dict needs 'input_ids', but this one has the keys 'text'; give token ids"),
        ({}, "a prompt that is a dict needs 'input_ids', but this one has the keys none; give token ids"),
        ([[1], [2]], "prompt 7 holds 2 rows of token ids; give each of them as a prompt"),
        ({"input_ids": [[1], [2]]}, "prompt 7 holds 2 rows of token ids; give each of them as a prompt"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask and input_ids have different shapes; give "
         "one number per token, or leave attention_mask out"),
        ({"input_ids": [[]]}, "prompt 7 is empty; give at least one token"),
        ({"input_ids": [1, 100]}, "prompt 7 holds token id 100; the vocabulary is 0..99"),
    ],
)  # fmt: skip
def test_what_is_no_prompt(prompt, message):
    """Breaks without the matching check in `rows_of` and `_one_row`."""
    with pytest.raises(UserError) as error:
        prompt_ids(MODEL, prompt, 7)
    assert str(error.value) == message
