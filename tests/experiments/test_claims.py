"""Verdicts: each rule's three outcomes, few seeds, missing runs, and invalid accuracies."""

import math

import pytest

from nat_jax.experiments import claims, members
from nat_jax.experiments.claims import (
    FAILS,
    HOLDS,
    NOISE,
    NOTHING,
    Difference,
    compare,
    settles,
)


def by_seed(*values):
    return dict(enumerate(values))


ABOVE, CLOSE = {}, {"rule": "close", "margin": 0.02}


@pytest.mark.parametrize(
    ("rule", "left", "right", "verdict"),
    [
        (ABOVE, (0.50, 0.51, 0.52), (0.40, 0.41, 0.42), HOLDS),
        (ABOVE, (0.40, 0.41, 0.42), (0.50, 0.51, 0.52), FAILS),
        (ABOVE, (0.50, 0.40, 0.45), (0.44, 0.46, 0.43), NOISE),
        (ABOVE, (0.50, 0.50, 0.50), (0.50, 0.50, 0.50), NOISE),
        (CLOSE, (0.50, 0.501, 0.499), (0.5, 0.5, 0.5), HOLDS),
        (CLOSE, (0.60, 0.601, 0.599), (0.5, 0.5, 0.5), FAILS),
        (CLOSE, (0.40, 0.401, 0.399), (0.5, 0.5, 0.5), FAILS),
        (CLOSE, (0.50, 0.55, 0.45), (0.5, 0.5, 0.5), NOISE),
    ],
)
def test_two_arms_are_compared_by_the_seeds_that_both_have(rule, left, right, verdict):
    left, right = by_seed(*left) | {7: 0.1}, by_seed(*right) | {8: 0.9}
    found = compare(left, right, tests=10_000, **rule)
    assert found.verdict == verdict
    assert found.seeds == (0, 1, 2)
    assert found.mean == pytest.approx(sum(left[i] - right[i] for i in range(3)) / 3)
    assert compare({0: 0.5}, {1: 0.4}, tests=10_000, **rule) is None


def test_the_noise_is_the_t_interval_of_paired_differences():
    # Differences 0.01, 0.02, 0.03: mean 0.02, deviation 0.01; t of 2 degrees of freedom is 4.303.
    found = compare(by_seed(0.31, 0.42, 0.53), by_seed(0.3, 0.4, 0.5), tests=10_000)
    assert found.noise == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)
    assert found.verdict == NOISE
    # The arms vary by 20 points and their differences do not: pairing is what sees it.
    assert compare(by_seed(0.31, 0.51), by_seed(0.3, 0.5), tests=10_000).verdict == HOLDS


def test_one_seed_has_the_noise_of_the_test_images():
    deviation = math.sqrt(2 * 0.25 / 10_000)
    found = compare({0: 0.5}, {0: 0.5}, tests=10_000)
    assert found.noise == pytest.approx(1.96 * deviation, rel=1e-3)
    assert compare({0: 0.52}, {0: 0.5}, tests=10_000).verdict == HOLDS
    assert compare({0: 0.52}, {0: 0.5}, tests=100).verdict == NOISE


@pytest.mark.parametrize("value", [-0.1, 1.1, 57.4, math.nan, math.inf])
def test_what_is_no_accuracy_is_refused(value):
    with pytest.raises(ValueError, match=r"accuracy: expected a number in \[0, 1\]; got"):
        compare({0: value}, {0: 0.5}, tests=10)
    with pytest.raises(ValueError, match="tests: expected at least 1 image; got 0"):
        compare({0: 0.5}, {0: 0.5}, tests=0)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.2, 0.4, 0.5, 0.52), HOLDS),
        ((0.2, 0.25, 0.3, 0.6), FAILS),  # it still rises, ever faster
        ((0.5, 0.4, 0.3, 0.3), FAILS),
        ((0.5, 0.5, 0.505, 0.6), NOISE),
    ],
)
def test_settles(values, verdict):
    curve = list(zip((0, 5, 10, 20), values, strict=True))
    gains = settles(curve, tests=10_000)
    assert [gain.verdict for gain in gains] == [verdict, verdict]
    assert sum(gain.mean for gain in gains) == pytest.approx(values[-1] - values[0])
    assert settles(curve[:2], tests=10_000) == ()


def test_a_claim_of_several_comparisons():
    holds, noise, fails = (Difference(0, 0, (0,), v) for v in (HOLDS, NOISE, FAILS))
    assert claims.overall([holds, holds]) == HOLDS
    assert claims.overall([holds, noise]) == NOISE
    assert claims.overall([holds, noise, fails]) == FAILS
    assert claims.overall([holds, None]) == NOTHING
    assert claims.overall([fails, None]) == FAILS
    assert claims.overall([]) == NOTHING


def test_every_arm_of_a_claim_is_a_member_of_the_suite():
    periods, ks = (members.values_of(n, "cifar10") for n in ("fig2_period", "discrete_targets"))
    found = claims.claims(periods, ks)
    arms = {arm for claim in found for arm in (claim.left, *claim.rights)}
    assert all(arm.value in members.values_of(arm.experiment, "cifar10") for arm in arms)
    assert {arm.experiment for arm in arms} == set(members.EXPERIMENTS)
    assert all(claim.rights or claim.rule == "settles" for claim in found)
