"""The Ray engine on a cluster of two nodes on this machine, which the test starts. Needs the extra `cluster`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import lab_stubs
import pytest

from topk.lab import grid, records, sweeps
from topk.lab.__main__ import main

HERE = Path(__file__).parent
TINY = HERE / "data" / "tiny.sweep.yaml"


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["sweep", str(TINY), "--engine", "ray", "--profile", "smoke"]) == 2
    assert "needs the extra `cluster`" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two nodes with one core each; their workers find the stubs, not the checkout's package."""
    pytest.importorskip("ray", reason="ray is not installed; `make test-cluster` makes an environment that has it")
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(HERE)
    nodes = Cluster()
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1, num_gpus=0, object_store_memory=80 * 2**20, include_dashboard=False)
        nodes.wait_for_nodes()
        yield nodes.address
    finally:
        nodes.shutdown()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def test_a_sweep_over_two_nodes_with_failures(cluster: str, tmp_path: Path) -> None:
    """Both nodes run; a run that fails and a run whose process is killed are told, and stop nobody."""
    from topk.lab.cluster import RayEngine

    text = TINY.read_text().partition("grid:")[0]
    seeds = [1, lab_stubs.FAILS, lab_stubs.DIES, 2, 3, 4]
    file = tmp_path / "some.sweep.yaml"
    file.write_text(f"{text}loss: {{name: hinge, k: 2}}\ngrid: {{seed: {seeds}}}\n")
    sweep, results = grid.read(file), tmp_path / "results"
    keys = {config["seed"]: key for key, config in sweep.configs.items()}
    engine = RayEngine(cluster)
    assert engine.slots == 2
    report = sweeps.run(sweep, results, engine, train=lab_stubs.train_and_tell_node, progress=False)
    assert sorted(report.ran) == sorted(keys[seed] for seed in (1, 2, 3, 4))
    assert sorted(report.failed) == sorted(keys[seed] for seed in (lab_stubs.FAILS, lab_stubs.DIES))
    assert "the loss is nan at step 3" in report.failed[keys[lab_stubs.FAILS]]
    assert "died" in report.failed[keys[lab_stubs.DIES]].lower()
    frame = records.load(results)
    assert frame["node"].nunique() == 2
    assert frame["package"].str.contains("working_dir_files").all(), "the sweep's own package travelled"
    assert frame["commit"].nunique(dropna=False) == 1
    log = (results / f"{keys[lab_stubs.FAILS]}.log").read_text()
    assert log.startswith("the seed is 13\n")
    failure = json.loads((results / f"{keys[lab_stubs.FAILS]}.failed.json").read_text())
    assert "in train\n" in failure["error"]["traceback"]
    assert not any((results / ".claims").iterdir())


def test_the_command_on_a_cluster(cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real training on the nodes gives what the loop gives here."""
    results = tmp_path / "results"
    arguments = ["sweep", str(TINY), "--profile", "smoke", "--engine", "ray", "--address", cluster]
    assert main([*arguments, "--results", str(results)]) == 0
    assert "6 ran" in capsys.readouterr().out
    assert records.check(results) == {}
    from topk.lab import training

    record = records.read(records.paths(results)[0])
    here = training.train(record["config"], progress=False)
    assert record["result"]["data_fingerprint"] == here["data_fingerprint"]
    assert record["result"]["final"]["top1"] == pytest.approx(here["final"]["top1"])


def test_another_copy_of_the_package_is_refused(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from topk.lab import cluster as room
    from topk.lab.workers import Job

    monkeypatch.setattr(room, "source", lambda _: "of another commit")
    engine = room.RayEngine(cluster, 1)
    engine.start(Job("a", next(iter(grid.read(TINY).configs.values()))))
    outcomes = engine.wait(60)
    engine.close()
    assert outcomes[0].error is not None
    assert "another copy of topk is in the way" in outcomes[0].error["message"]


def test_a_node_that_vanishes_is_noticed(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine goes away while it runs something: the run has failed, nobody waits for it."""
    from ray.cluster_utils import Cluster

    from topk.lab.cluster import RayEngine
    from topk.lab.workers import Job

    told = tmp_path / "told"
    monkeypatch.setenv(lab_stubs.RUNS, str(told))
    alone = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    node = alone.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    alone.wait_for_nodes()
    engine = RayEngine(alone.address, 1)
    config = next(iter(grid.read(TINY, "smoke").configs.values())) | {"seed": lab_stubs.HANGS}
    engine.start(Job("a", config, train=lab_stubs.train))
    for _ in range(600):
        assert not engine.wait(0.1)
        if told.exists():
            break
    alone.remove_node(node, allow_graceful=False)
    outcomes = []
    for _ in range(60):
        outcomes = engine.wait(1)
        if outcomes:
            break
    assert outcomes[0].key == "a"
    assert outcomes[0].error is not None
    assert "is dead or unavailable" in outcomes[0].error["message"]
    engine.close()
    alone.shutdown()
