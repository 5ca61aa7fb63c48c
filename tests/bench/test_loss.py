"""The forms of the loss that are measured are one loss."""

import jax
import numpy as np
import pytest
from reference.tiers import sampled

from mtp_jax.bench import loss


@pytest.mark.grid
def test_weightless_share():
    """The share that was asked for weighs nothing; states that are no numbers there harm `fused` and not `skip`.

    Breaks if the share is that of the tokens that count, or if `skip` is measured with every token.
    """
    setting = loss.Setting(heads=2, vocab=8, tokens=2000, width=4, weightless=0.75)
    hidden_MBTD, *others, weights_MBT = loss.make_arrays(setting, 4, 500)
    assert np.mean(weights_MBT == 0) == pytest.approx(0.75, abs=0.03)
    hidden_MBTD = jax.numpy.where(weights_MBT[..., None] == 0, np.nan, hidden_MBTD)
    finite = {
        name: np.isfinite(loss.form(name, setting)(hidden_MBTD, *others, weights_MBT)) for name in ("fused", "skip")
    }
    assert finite == {"fused": False, "skip": True}


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(loss.FORMS, "skip"))
def test_forms_are_one_loss(name):
    """Every form's gradients equal those by the formula in float64, weights included.

    Breaks if a form ignores the weights, or if the formula forgets to subtract the target.
    """
    setting = loss.Setting(heads=3, vocab=50, tokens=24, rows=2, width=8, chunk_bytes=4 * 50 * 5)
    arrays = loss.make_arrays(setting, 2, 12)
    found = jax.grad(loss.form(name, setting), (0, 1))(*arrays)
    for ours, exact in zip(found, loss.exact_gradients(*arrays), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-6)
    assert loss.gradient_error(setting, name) < 1e-5
