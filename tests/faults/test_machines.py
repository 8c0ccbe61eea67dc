"""Rows of the fault matrix about machines: one that goes and comes back, one that runs out of memory."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.faults import invariants, rewards
from tests.faults.harness import Scene, gate_of
from tests.faults.hosts import Hosts, can_be_made, two_hosts
from tests.faults.leaks import nothing_left

pytestmark = [pytest.mark.ray, pytest.mark.faults]

CGROUP = Path("/sys/fs/cgroup/memory")
MEMORY = 16 * 2**20  # that its processes may take from then on; what they have stays charged elsewhere


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head, and two more nodes of this machine."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    yield made
    made.shutdown()


def components_on(scene: Scene, node: str) -> set[str]:
    return {name for name, each in scene.job.status().components.items() if each["node"] == node}


def test_a_node_goes_and_another_comes_and_the_run_goes_on(
    paced_run: Any, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # Cluster starts nodes without a token
    second = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    config = paced_run(loop={"steps": 90}, generation={"workers": 4, "slots": 8}, rewards={"workers": 2})
    with Scene.start(config, address=cluster.address) as scene:
        scene.until(step=3)
        lost = components_on(scene, second.node_id)
        assert lost and "queue" not in lost, "Ray spreads workers over nodes; the queue stays with the driver"
        cluster.remove_node(second, allow_graceful=False)
        for name in lost:
            scene.until(lambda status, name=name: status.components[name]["restarts"] > 0, what=f"{name} to be lost")
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        before = scene.job.status().step
        scene.until(step=before + 5)
        ended = scene.end()
    found = invariants.hold(ended, kills=len(lost))
    assert ended.result is not None and ended.result["draws"]["committed"] == 90 * 8
    assert {each["component"] for each in ended.told("lost")} == lost
    assert found.states()


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    if why := can_be_made():
        pytest.skip(why)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with two_hosts(tmp_path) as made:
        yield made


def test_a_short_partition_costs_nothing_and_a_long_one_only_what_was_beyond_it(paced_run: Any, hosts: Hosts) -> None:
    config = paced_run(
        pace_s=0.5,  # it lasts until whoever was lost is back, on a machine with much else to do
        loop={"steps": 150},
        generation={"workers": 3, "slots": 8},
        rewards={"workers": 2},
        supervise={"hang_s": 8, "busy_s": 12},
    )
    with Scene.start(config, address=hosts.address) as scene:
        scene.until(step=3)
        here = scene.job.status().components["queue"]["node"]
        beyond = {name for name, each in scene.job.status().components.items() if each["node"] != here}
        assert beyond, "Ray spreads workers over hosts"
        hosts.pull()
        time.sleep(4)
        hosts.plug()
        scene.until(step=scene.job.status().step + 5)
        assert scene.job.status().incidents == 0
        hosts.pull()
        for name in beyond:
            scene.until(lambda status, name=name: status.components[name]["restarts"] > 0, what=f"{name} to be lost")
        hosts.plug()
        for name in beyond:
            scene.serving(name)
        time.sleep(3)  # whoever was beyond speaks up again, and is refused
        ended = scene.end()
    invariants.hold(ended, kills=len(ended.told("lost")))
    assert ended.result is not None and ended.result["draws"]["committed"] == 150 * 8
    assert {each["component"] for each in ended.told("lost")} == beyond


def test_a_bad_line_slows_a_run_and_restarts_nobody(paced_run: Any, hosts: Hosts) -> None:
    config = paced_run(generation={"workers": 3, "slots": 8}, rewards={"workers": 2})
    with Scene.start(config, address=hosts.address) as scene:
        scene.until(step=3)
        here = scene.job.status().components["queue"]["node"]
        assert any(each["node"] != here for each in scene.job.status().components.values())
        hosts.worsen(delay_s=0.2, loss=0.01)
        scene.until(step=scene.job.status().step + 10)
        assert scene.job.status().incidents == 0
        ended = scene.end()
    invariants.hold(ended)
    assert ended.result is not None and ended.result["draws"]["committed"] == 60 * 8


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A cgroup whose processes may have little memory."""
    group = CGROUP / f"millrace-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(MEMORY))
    except OSError as caught:
        pytest.skip(f"no memory cgroup can be made here: {caught}")
    yield group
    for pid in (group / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    group.rmdir()


def test_one_that_runs_out_of_memory_comes_back_and_the_reason_is_said(
    paced_run: Any, small_cgroup: Path, tmp_path: Path
) -> None:
    meal, gate = tmp_path / "meal", gate_of(tmp_path / "runs" / "run")
    verifier = {"name": rewards.named(rewards.hungry), "gate": str(gate), "meal": str(meal)}
    with nothing_left(), Scene.start(paced_run(rewards={"verifier": verifier})) as scene:
        scene.until(step=2)
        hit = scene.send(signal.SIGCONT, "reward-0")  # a signal that does nothing: only who and when
        (small_cgroup / "cgroup.procs").write_text(str(hit.pid))
        meal.touch()
        lost = scene.lost(hit)
        meal.unlink()
        scene.back(hit)
        ended = scene.end()
    assert "ran out of memory" in lost["cause"]
    invariants.hold(ended, hits=[hit])
