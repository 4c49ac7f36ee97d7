"""Health: chance level, and warnings exactly where something is wrong."""

import math

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from nat_jax.training import health
from nat_jax.training.health import chance_cosine


@pytest.mark.parametrize(("n", "dim"), [(64, 10), (256, 10), (256, 64), (128, 512)])
def test_chance_is_what_matching_unrelated_points_reaches(n: int, dim: int) -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(2, n, dim))
    points /= np.linalg.norm(points, axis=-1, keepdims=True)
    cosines = points[0] @ points[1].T
    reached = cosines[linear_sum_assignment(-cosines)].mean()
    assert chance_cosine(n, dim) == pytest.approx(reached, rel=0.06)
    assert math.sqrt(2 * math.log(n) / dim) != pytest.approx(reached, rel=0.06)


def test_chance_at_the_edges() -> None:
    assert chance_cosine(1, 10) == 0
    assert chance_cosine(5, 1) == 1
    assert 0.99 < chance_cosine(256, 2) <= 1
    large = math.sqrt(2 * math.log(10**6) / 2048)
    assert chance_cosine(10**6, 2048) == pytest.approx(large, rel=0.15)
    with pytest.raises(ValueError, match="n=0, dim=3"):
        chance_cosine(0, 3)


GOOD = {
    "train/loss": 0.3,
    "assign/cosine_before": 0.4,
    "assign/cosine_after": 0.8,
    "assign/moved": 0.5,
    "assign/worst_status": 0,
    "features/effective_rank": 8.0,
}


def warnings(row: dict[str, float]) -> list[str]:
    return [line for line in health.sentences(row, n=256, dim=10) if line.startswith("warning:")]


def test_a_healthy_run_has_no_warning_and_all_its_numbers() -> None:
    text = "\n".join(health.sentences(GOOD, n=256, dim=10))
    assert not warnings(GOOD)
    for part in ("0.400", "0.800", "0.750", "it is learning", "50% of the images", "8.0, of 9.7"):
        assert part in text


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"train/loss": math.nan}, "not finite"),
        ({"features/effective_rank": 1.05}, "collapse"),
        ({"assign/worst_status": 2}, "solver"),
        ({"assign/cosine_after": 0.3}, "lowered the cosine"),
    ],
)
def test_each_trouble_is_one_warning(change: dict[str, float], word: str) -> None:
    (warning,) = warnings(GOOD | change)
    assert word in warning


def test_nothing_learnt_yet_is_said() -> None:
    text = "\n".join(health.sentences(GOOD | {"assign/cosine_before": 0.001}, n=256, dim=10))
    assert "nothing is learnt yet" in text and "it is learning" not in text


def test_noise_of_a_small_batch_is_no_learning() -> None:
    row = GOOD | {"assign/cosine_before": 0.05}
    assert "it is learning" in "\n".join(health.sentences(row, n=4096, dim=10))
    assert "nothing is learnt yet" in "\n".join(health.sentences(row, n=16, dim=64))


def test_a_few_steps_are_too_early_to_judge():
    row = GOOD | {"features/effective_rank": 1.01}
    for steps, judged in ((99, False), (100, True)):
        text = "\n".join(health.sentences(row, n=256, dim=10, steps=steps))
        assert ("collapse" in text) == judged and ("too early" in text) != judged


def test_collapsed_features_are_not_called_learning() -> None:
    text = "\n".join(health.sentences(GOOD | {"features/effective_rank": 1.01}, n=256, dim=10))
    assert "collapse" in text and "learning" not in text.replace("learning_rate", "")


def test_a_matching_in_the_first_epoch_only_is_not_judged() -> None:
    first = "\n".join(health.sentences(GOOD, n=256, dim=10, matched_epoch=0))
    later = "\n".join(health.sentences(GOOD, n=256, dim=10, matched_epoch=3))
    assert "too early to judge" in first and "it is learning" not in first
    assert "in epoch 3" in later and "it is learning" in later


def test_matching_of_all_images_has_words_of_its_own() -> None:
    def text(row: dict[str, float], epoch: int) -> str:
        return "\n".join(
            health.sentences(row, n=1437, dim=10, matched_epoch=epoch, scope="dataset")
        )

    assert "before re-matching after epoch 3," in text(GOOD, 3)
    assert "all images were re-matched after epoch 0 only" in text(GOOD, 0)
    assert "between epochs only: train for more than one" in text({}, -3)


def test_what_is_missing_is_not_judged() -> None:
    assert health.sentences({}, n=256, dim=10) == []
    assert health.sentences({"features/effective_rank": math.nan}, n=256, dim=10) == []
    assert warnings({"features/effective_rank": 1.0})
    assert health.sentences({"features/effective_rank": 1.0}, n=1, dim=1)[0].startswith(
        "effective rank"
    )
