"""benchmarks/ablations.py: every variant is another run of equal work, and the table is its own."""

import argparse
import queue
import sys

import pytest
from project import ROOT

from nat_jax import config, evaluate
from nat_jax.cli import config_files

sys.path.append(str(ROOT / "benchmarks"))

import ablations


def flags(command: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--config.").split("=", 1) for word in command[3:])


def test_each_variant_undoes_one_choice_for_equal_work(tmp_path):
    options = argparse.Namespace(source="folder:X", per_class=9, epochs=4.0, scratch=tmp_path)
    preset = config.flatten(config_files.load("modern/cifar10.py").get_config())
    assert preset["data.views"] == ablations.VIEWS
    work = {}
    for name, changes in ablations.VARIANTS.items():
        for key, value in changes.items():
            assert preset[key] != value, (name, key)
        given = flags(ablations.command(name, 1, options))
        assert given["seeds"] == "(1,)" and given["data.source"] == "folder:X"
        c = config_files.load("modern/cifar10.py").get_config()
        c.update_from_flattened_dict({**ablations.COMMON, **changes})
        config.validate(c, evaluate.PROBES)
        work[name] = float(given["epochs"]) * c.data.views
        assert given["--workdir"] == str(ablations.folder(name, 1, options))
    assert set(work.values()) == {8.0}
    longer = argparse.Namespace(scratch=tmp_path, per_class=9, epochs=5.0)
    folders = {ablations.folder(name, 0, o) for name in work for o in (options, longer)}
    assert len(folders) == 2 * len(work)


def test_the_table_has_means_and_deviations():
    def found(nat: float) -> dict:
        rows = [("untrained", 0.25), ("nat", nat)]
        table = [
            {"network": network, "features": "z", "probe": "knn", "values": [value]}
            for network, value in rows
        ]
        return {"table": table}

    rows = ablations.summary({"as it is": [found(0.5), found(0.6)], "other": [found(0.4)]})
    assert ablations.markdown(rows).splitlines() == [
        "| | z, kNN |",
        "| --- | ---: |",
        "| untrained | 25.0 ± 0.0 |",
        "| as it is | 55.0 ± 7.1 |",
        "| other | 40.0 |",
    ]


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    cores: queue.Queue[int] = queue.Queue()
    cores.put(0)
    monkeypatch.setattr(
        ablations, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"]
    )
    options = argparse.Namespace(scratch=tmp_path, per_class=9, epochs=1.0)
    with pytest.raises(SystemExit, match=r"one view, seed 0: exit 3, see .*one_view-0\.log"):
        ablations.run("one view", 0, options, cores)
    assert cores.get_nowait() == 0
