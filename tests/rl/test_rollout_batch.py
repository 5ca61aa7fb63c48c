"""Rollouts in fixed shapes. Each docstring names the line whose deletion breaks the test."""

import numpy as np
import pytest

from mtp_jax.errors import UserError
from mtp_jax.rl.batch import Rollout, pack

FIRST = Rollout([5, 6], [7, 8, 9], [-1.0, -2.0, -0.5], [0.1, 0.2, 0.3], 1.5)
SECOND = Rollout([4], [3], [-0.25], [0.75], -1.0)


def test_every_number_stands_at_its_own_token():
    """weights = 1 exactly on the response; log-probabilities and entropies at the same places; padding is 0 and has
    segment 0. Breaks if anything is shifted by one, or if the prompt has weight."""
    batch = pack([FIRST, SECOND], rows=3, length=6)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0], [4, 3, 0, 0, 0, 0], [0] * 6]
    assert batch.segment_ids.tolist() == [[1] * 5 + [0], [1, 1, 0, 0, 0, 0], [0] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert batch.weights.tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    assert batch.logprobs.tolist() == [[0, 0, -1, -2, -0.5, 0], [0, -0.25, 0, 0, 0, 0], [0] * 6]
    np.testing.assert_allclose(batch.entropies, [[0, 0, 0.1, 0.2, 0.3, 0], [0, 0.75, 0, 0, 0, 0], [0] * 6])
    assert batch.advantages.tolist() == [1.5, -1.0, 0.0]


def test_names_and_dtypes():
    """The arrays have the names and dtypes of training batches; `reference` only if there is one. Breaks without
    `arrays` leaving None out."""
    with_reference = [one._replace(reference=one.logprobs) for one in (FIRST, SECOND)]
    plain = pack([FIRST, SECOND], 2, 6).arrays()
    arrays = pack(with_reference, 2, 6).arrays()
    assert set(arrays) - set(plain) == {"reference"}
    whole = {"tokens", "segment_ids", "positions"}
    assert {name: array.dtype for name, array in arrays.items()} == {
        name: np.int32 if name in whole else np.float32 for name in arrays
    }
    np.testing.assert_array_equal(arrays["reference"], arrays["logprobs"])


@pytest.mark.parametrize(
    ("rollouts", "said"),
    [
        ([], "0 rollouts for a batch of 2 rows; give from 1 to 2"),
        ([FIRST] * 3, "3 rollouts for a batch of 2 rows"),
        ([FIRST, FIRST._replace(prompt=[])], "rollout 1 has no prompt"),
        (
            [FIRST._replace(prompt=[1] * 4)],
            "rollout 0 has 4 tokens of prompt and 3 of response, 7 in all, but rows have 6",
        ),
        ([FIRST._replace(logprobs=[-1.0])], "rollout 0 has 3 tokens of response, but 1 logprobs"),
        ([FIRST._replace(entropies=[0.0] * 4)], "rollout 0 has 3 tokens of response, but 4 entropies"),
        ([FIRST._replace(reference=[0.0])], "rollout 0 has 3 tokens of response, but 1 reference"),
        ([FIRST._replace(logprobs=[-1.0, float("-inf"), 0.0])], "rollout 0 has logprobs that are not finite"),
        ([FIRST._replace(advantage=float("nan"))], "rollout 0 has the advantage nan"),
        ([FIRST, SECOND._replace(reference=[0.0])], "rollout 1: either all rollouts have reference"),
    ],
)
def test_what_does_not_fit_is_refused(rollouts, said):
    """Each case is one line that names the rollout. Breaks without any one of the checks."""
    with pytest.raises(UserError) as caught:
        pack(rollouts, rows=2, length=6)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
