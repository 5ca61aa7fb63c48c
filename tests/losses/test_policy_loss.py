"""The loss of policy gradients against numpy, line by line. Each docstring names the line whose deletion breaks it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.quick import quick_jit

from mtp_jax.errors import UserError
from mtp_jax.losses.entropy import EntropyWeights
from mtp_jax.losses.policy import (
    Drawn,
    PolicyLoss,
    advantages,
    k3,
    learned_shares,
    overlong_penalty,
    policy_loss,
    token_shares,
)


def test_advantages():
    """A = (R - mean) / std over the samples of each prompt, or R - mean; 0 in a group of equal rewards, also where the
    mean rounds. Breaks without `equal`: (0.1 - mean) / std = 1 there."""
    rewards_B = np.array([1, 0, 0, 1, 1, 1, 1, 0, 0.1, 0.1, 0.1, 0.1])
    by_std = advantages(rewards_B, 4)
    np.testing.assert_allclose(by_std[:4], [1, -1, -1, 1])
    np.testing.assert_allclose(by_std[4:8], np.array([0.25, 0.25, 0.25, -0.75]) / np.sqrt(3 / 16))
    assert by_std[8:].tolist() == [0.0] * 4
    np.testing.assert_allclose(advantages(rewards_B, 4, "group_mean")[4:8], [0.25, 0.25, 0.25, -0.75])
    three_B = np.full(3, 0.1)
    assert three_B.mean() != 0.1 and advantages(three_B, 3).tolist() == [0.0] * 3


def test_overlong_penalty():
    """0 up to 12 tokens, -1/4 for each token more, -1 at 16 and beyond (DAPO, equation 13); 0 without a buffer. Breaks
    with the penalty of a length that is one off."""
    lengths_B = np.array([1, 12, 13, 14, 16, 20])
    assert overlong_penalty(lengths_B, 16, 4).tolist() == [0, 0, -0.25, -0.5, -1, -1]
    assert overlong_penalty(lengths_B, 16, 0).tolist() == [0] * 6


WEIGHTS_BT = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], np.float32)


def test_shares():
    """tokens: 1/6 for each of the 6 tokens. sequences: half of each of the 2 responses with tokens, spread over its
    tokens. Nothing to learn: 0, not nan. Breaks if a row without tokens counts as a response."""
    tokens = token_shares(PolicyLoss(), jnp.asarray(WEIGHTS_BT))
    np.testing.assert_allclose(tokens, WEIGHTS_BT / 6, rtol=1e-6)
    sequences = PolicyLoss(normaliser="sequences")
    expected = [[0, 0.25, 0.25, 0], [0.125] * 4, [0] * 4]
    np.testing.assert_allclose(token_shares(sequences, jnp.asarray(WEIGHTS_BT)), expected, rtol=1e-6)
    for options in (sequences, PolicyLoss()):
        np.testing.assert_array_equal(token_shares(options, jnp.zeros((2, 3))), 0)


ENTROPY_BT = np.array([[9, 4, 1, 9], [3, 6, 5, 2], [9, 9, 9, 9]], np.float32)


@pytest.mark.parametrize("normaliser", ["tokens", "sequences"])
def test_normalisers_of_the_mask(normaliser):
    """`all` keeps the shares of the selected half; `selected` multiplies them so that they sum to the shares of all:
    by N/k for tokens, per response for sequences. Breaks without `by_row`."""
    options = {
        name: PolicyLoss(normaliser=normaliser, entropy=EntropyWeights("keep_top", 0.5, normaliser=name))
        for name in ("all", "selected")
    }
    shares_BT = token_shares(options["all"], jnp.asarray(WEIGHTS_BT))
    found = {name: np.asarray(learned_shares(one, jnp.asarray(ENTROPY_BT), shares_BT)) for name, one in options.items()}
    kept_BT = np.array([[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])  # entropies 4, 6, 5 of 6
    np.testing.assert_array_equal(found["all"], shares_BT * kept_BT)
    expected = kept_BT / 3 if normaliser == "tokens" else kept_BT * np.array([[0.5], [0.25], [0]])
    np.testing.assert_allclose(found["selected"], expected, rtol=1e-6)


def numpy_loss(options, logprobs_BT, old_BT, advantages_B, reference_BT, shares_BT, learned_BT):
    """The loss and what is reported, token by token in float64."""
    loss, reports = 0.0, dict.fromkeys(("kl", "clip_share", "dual_clip_share", "approx_kl", "ratio"), 0.0)
    for b, t in np.argwhere(shares_BT > 0):
        A, share = float(advantages_B[b]), float(shares_BT[b, t])
        ratio = np.exp(np.float64(logprobs_BT[b, t]) - old_BT[b, t])
        limited = min(max(ratio, 1 - options.clip_low), 1 + options.clip_high) * A
        surrogate = min(ratio * A, limited)
        dual = bool(options.dual_clip) and A < 0 and surrogate < options.dual_clip * A
        surrogate = options.dual_clip * A if dual else surrogate
        log_reference = np.float64(reference_BT[b, t]) - logprobs_BT[b, t]
        kl = np.exp(log_reference) - 1 - log_reference
        loss += -float(learned_BT[b, t]) * surrogate + options.kl * share * kl
        found = (kl * bool(options.kl), limited < ratio * A, dual, ratio - 1 - np.log(ratio), ratio)
        for name, value in zip(reports, found, strict=True):
            reports[name] += share * float(value)
    return loss, reports


def problem(seed=0):
    rng = np.random.default_rng(seed)
    logprobs_BT = rng.uniform(-3, -0.1, (3, 4)).astype(np.float32)
    old_BT = (logprobs_BT + rng.normal(0, 0.6, (3, 4))).astype(np.float32)
    reference_BT = (logprobs_BT + rng.normal(0, 0.6, (3, 4))).astype(np.float32)
    return logprobs_BT, old_BT, np.array([1.5, -0.5, 2.0], np.float32), reference_BT


loss_of = functools.partial(quick_jit, static_argnums=0)(
    jax.value_and_grad(policy_loss, argnums=1, has_aux=True),
)


@pytest.mark.parametrize(
    "options",
    [
        PolicyLoss(),
        PolicyLoss(clip_low=0.1, clip_high=0.5, dual_clip=1.3, kl=0.05, entropy=EntropyWeights("keep_top", 0.5)),
        PolicyLoss(dual_clip=1.3, normaliser="sequences", kl=0.5),
    ],
)
def test_loss_and_reports(options):
    """loss = - sum learned * max(min(r A, clip(r) A), c A if A < 0) + kl * sum share * k3; the reports are means over
    all tokens, masked or not; the gradient is that of finite differences of the numpy loss.

    Breaks with one clip for both sides, a dual clip for positive advantages, or a KL that is masked.
    """
    logprobs_BT, old_BT, advantages_B, reference_BT = problem()
    shares_BT = token_shares(options, jnp.asarray(WEIGHTS_BT))
    learned_BT = learned_shares(options, jnp.asarray(ENTROPY_BT), shares_BT)
    given = (old_BT, advantages_B, reference_BT)
    (loss, reports), gradient_BT = loss_of(options, logprobs_BT, Drawn(*given), shares_BT, learned_BT)
    shares = (np.asarray(shares_BT), np.asarray(learned_BT))
    expected, expected_reports = numpy_loss(options, logprobs_BT, *given, *shares)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    kept = reports.pop("kept")
    np.testing.assert_allclose(kept, np.sum(shares[0] * (shares[1] > 0)), rtol=1e-6)
    assert reports.keys() == expected_reports.keys()
    for name, value in expected_reports.items():
        np.testing.assert_allclose(reports[name], value, rtol=2e-5, atol=1e-7, err_msg=name)
    assert reports["clip_share"] > 0 and (not options.dual_clip or reports["dual_clip_share"] > 0)
    for b, t in np.ndindex(3, 4):
        sides = []
        for move in (1e-6, -1e-6):
            moved_BT = logprobs_BT.astype(np.float64)
            moved_BT[b, t] += move
            sides.append(numpy_loss(options, moved_BT, *given, *shares)[0])
        np.testing.assert_allclose(gradient_BT[b, t], (sides[0] - sides[1]) / 2e-6, rtol=1e-3, atol=1e-6)


def test_on_policy():
    """Where nothing has changed: ratio 1, no clip, no KL, and the loss is -sum share A. An enormous change gives finite
    numbers. Breaks without the bound of the log ratio."""
    logprobs_BT, _, advantages_B, _ = problem()
    shares_BT = token_shares(PolicyLoss(), jnp.asarray(WEIGHTS_BT))
    arguments = (logprobs_BT, Drawn(logprobs_BT, advantages_B), shares_BT, shares_BT)
    (loss, reports), gradient_BT = loss_of(PolicyLoss(), *arguments)
    assert (reports["clip_share"], reports["approx_kl"], reports["dual_clip_share"]) == (0, 0, 0)
    np.testing.assert_allclose(reports["ratio"], 1, rtol=1e-6)
    np.testing.assert_allclose(loss, -np.sum(shares_BT * advantages_B[:, None]), rtol=1e-6)
    np.testing.assert_allclose(gradient_BT, -shares_BT * advantages_B[:, None], rtol=1e-6)
    far = Drawn(logprobs_BT - 1e4, advantages_B)
    (loss, reports), gradient_BT = loss_of(PolicyLoss(), logprobs_BT, far, shares_BT, shares_BT)
    assert np.all(np.isfinite([loss, *reports.values()])) and np.all(np.isfinite(gradient_BT))


def test_tokens_that_do_not_count():
    """Whatever stands at tokens without a share, loss, reports and gradient are those with zeros there, bit for bit.
    Breaks without `counted_BT`: 0 * (inf - inf) is not a number."""
    options = PolicyLoss(dual_clip=1.3, normaliser="sequences", kl=0.5)
    logprobs_BT, old_BT, advantages_B, reference_BT = problem()
    shares_BT = token_shares(options, jnp.asarray(WEIGHTS_BT))
    found = []
    for other in (0.0, -np.inf, np.nan):
        filled = [np.where(shares_BT > 0, x_BT, np.float32(other)) for x_BT in (logprobs_BT, old_BT, reference_BT)]
        drawn = Drawn(filled[1], advantages_B, filled[2])
        found.append(loss_of(options, filled[0], drawn, shares_BT, shares_BT))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)


def test_k3():
    """The mean of k3 over a distribution p is KL(p, q), and no value is negative. Breaks with the ratio the other way
    round."""
    p_V, q_V = (np.random.default_rng(seed).dirichlet(np.ones(6)) for seed in (1, 2))
    values_V = np.asarray(k3(jnp.log(p_V)[None], jnp.log(q_V)[None]))[0]
    np.testing.assert_allclose(np.sum(p_V * values_V), np.sum(p_V * np.log(p_V / q_V)), rtol=1e-4)
    assert np.all(values_V >= 0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PolicyLoss(clip_low=1.5), "PolicyLoss.clip_low=1.5"),
        (lambda: PolicyLoss(clip_high=-0.1), "PolicyLoss.clip_high=-0.1"),
        (lambda: PolicyLoss(dual_clip=1.0), "PolicyLoss.dual_clip=1.0; it must be above 1"),
        (lambda: PolicyLoss(normaliser="rows"), "PolicyLoss.normaliser='rows'"),
        (lambda: PolicyLoss(kl=-1.0), "PolicyLoss.kl=-1.0"),
        (lambda: PolicyLoss(temperature=0.0), "PolicyLoss.temperature=0.0"),
        (lambda: advantages(np.ones(5), 2), "rewards of shape (5,) are not groups of samples=2"),
        (lambda: advantages(np.array([0, np.nan]), 2), "reward 1 is not finite"),
        (lambda: advantages(np.ones(4), 2, "std"), "kind='std'; choose one of group_std, group_mean"),
        (lambda: overlong_penalty(np.ones(2), 4, 5), "buffer=5; it must be from 0 to the longest response, 4"),
    ],
)
def test_refused(make, said):
    """One line that names the setting. Breaks without any of the checks."""
    with pytest.raises(UserError) as caught:
        make()
    assert said in str(caught.value) and "\n" not in str(caught.value)
