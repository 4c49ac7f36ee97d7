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
        assert not {"train", "test", "seed", "num_classes", "options"} & set(statement)


def test_a_linear_probe_states_its_fit_alone() -> None:
    lbfgs, sgd = protocol("linear_probe"), protocol("linear_probe", {"fit": "sgd", "l2": 0.0})
    assert (lbfgs["fit"], lbfgs["l2"], lbfgs["max_iterations"]) == ("lbfgs", 3e-3, 200)
    assert (sgd["fit"], sgd["l2"], sgd["learning_rate"]) == ("sgd", 0.0, 0.01)
    assert "learning_rate" not in lbfgs and "max_iterations" not in sgd
    assert lbfgs["statement"] != sgd["statement"]


def test_a_stream_is_told_from_cached_features() -> None:
    for name in ("mlp_probe", "linear_probe"):
        streamed = protocol(name, {"epochs": 5}, streamed=True)
        assert "newly augmented" in streamed["features"]
        assert "batch_size" not in streamed and streamed["epochs"] == 5
    assert protocol("mlp_probe")["features"].startswith("cached")
    assert protocol("mlp_probe")["batch_size"] == 256
    for name, options in (("knn", {}), ("linear_probe", {"fit": "ridge"})):
        with pytest.raises(ValueError, match="only SGD learns from a stream"):
            protocol(name, options, streamed=True)


def test_protocol_rejects() -> None:
    with pytest.raises(ValueError, match="'svm'; known: knn, linear_probe, mlp_probe"):
        protocol("svm")
    with pytest.raises(ValueError, match="unknown option neighbours; known: k, temperature"):
        protocol("knn", {"neighbours": 3})
    with pytest.raises(ValueError, match="unknown option epochs; known: fit, l2, max_iterations"):
        protocol("linear_probe", {"epochs": 3})
    with pytest.raises(ValueError, match="unknown fit 'svm'; known: lbfgs, sgd, ridge"):
        protocol("linear_probe", {"fit": "svm"})
