"""Joining a cluster that is already running, on nodes of its own."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from millrace.cluster import jobs
from millrace.cluster.runtime import ray_cluster
from millrace.core.errors import ConfigError

pytestmark = pytest.mark.ray


@pytest.fixture
def address() -> Iterator[str]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    yield cluster.address
    cluster.shutdown()


def test_a_run_on_a_cluster_of_two_nodes_ends_and_leaves_the_cluster_up(make_run: Any, address: str) -> None:
    found = jobs.train(make_run(loop={"steps": 3}), address=address, say=lambda line: None)
    assert (found["ended"], found["steps"], found["waste"]["unaccounted"]) == ("finished", 3, 0)
    assert not ray.is_initialized()
    with ray_cluster(address):
        assert len(ray.nodes()) == 2
        assert ray.cluster_resources()["CPU"] == 2


def test_a_cluster_that_does_not_answer_is_named() -> None:
    with (
        pytest.raises(ConfigError, match=r"joining the Ray cluster at 127\.0\.0\.1:1 .*Connection refused"),
        ray_cluster("127.0.0.1:1"),
    ):
        pass
