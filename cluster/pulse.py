"""Whether Ray lives. Ray itself notices after a minute or never that its own processes have ended, and every call to
an actor waits meanwhile."""

import asyncio
import time
from contextlib import suppress

import psutil
import ray

from millrace.cluster.runtime import answers

PULSE_S = 0.5
VITAL = ("gcs_server", "raylet")  # no run goes on without them
GONE_S = 10.0  # that a cluster may be out of reach: a link comes back
KNOCKS_S = 2.0


async def death(address: str | None) -> str:
    """Wait until a process of Ray has ended that no run goes on without. Returns which, and how.

    Args:
        address: of the cluster that was joined; None: Ray's processes are children of this one.
    """
    if address is not None:
        return await _silence()
    vital = [child for child in psutil.Process().children() if child.name() in VITAL]
    names = {process.pid: process.name() for process in vital}
    while True:
        for process in vital:
            if (how := _end(process)) is not None:
                return f"Ray's {names[process.pid]}, process {process.pid}, {how}"
        await asyncio.sleep(PULSE_S)


def _end(process: psutil.Process) -> str | None:
    """How it ended; None while it lives."""
    with suppress(psutil.Error):
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return None
        try:
            status = process.wait(timeout=0)
        except psutil.TimeoutExpired:  # some of its threads are still ending: how, is told when all have
            return None
        if status is not None:
            return f"was ended by {status.name}" if hasattr(status, "name") else f"ended with status {status}"
    return "has ended"


async def _silence() -> str:
    """Until the head, or the part of Ray on this node, has not answered for so long that it is gone."""
    node = ray.get_runtime_context().get_node_id()
    own = next(each for each in ray.nodes() if each["NodeID"] == node)
    vital = {
        "the head": ray.get_runtime_context().gcs_address,
        "the raylet of this node": f"{own['NodeManagerAddress']}:{own['NodeManagerPort']}",
    }
    heard = dict.fromkeys(vital, time.monotonic())
    while True:
        await asyncio.sleep(KNOCKS_S)
        for name, where in vital.items():
            try:
                await asyncio.to_thread(answers, where)
                heard[name] = time.monotonic()
            except OSError as caught:
                silent_s = time.monotonic() - heard[name]
                if silent_s > GONE_S:
                    return f"{name} of the Ray cluster, at {where}, has not answered for {silent_s:.0f} s: {caught}"
