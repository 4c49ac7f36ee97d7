"""The table of probes and their statements."""

import pytest

from nat_jax.evaluate import PROBES, protocol


def test_protocol_states_every_option() -> None:
    assert protocol("knn")["k"] == 20
    assert protocol("knn", {"k": 5, "temperature": None}) == {
        **protocol("knn"),
        "k": 5,
        "temperature": None,
    }
    mlp = protocol("mlp_probe", {"hidden": 64})
    assert (mlp["hidden"], mlp["epochs"], mlp["weight_decay"]) == (64, 100, 1e-8)
    for name in PROBES:
        statement = protocol(name)
        assert statement["probe"] == name and statement["statement"]
        assert not {"train", "test", "seed", "num_classes"} & set(statement)


def test_protocol_rejects() -> None:
    with pytest.raises(ValueError, match="'svm'; known: knn, linear_probe, mlp_probe"):
        protocol("svm")
    with pytest.raises(ValueError, match="unknown option neighbours; known: k, temperature"):
        protocol("knn", {"neighbours": 3})
