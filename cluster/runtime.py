"""Ray for one job: an embedded local cluster that starts by itself, or one that is already running."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import c_int, c_void_p, pythonapi
from typing import Any

import ray

from millrace.cluster.guard import guarded
from millrace.core.errors import ConfigError, boundary

# Every process of a run gets these; what the user set stands.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # several processes share the cores of a machine without a GPU
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

pythonapi.PyOS_getsig.restype = c_void_p
pythonapi.PyOS_setsig.restype = c_void_p

TOKEN = "a cluster with tokens wants one here: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
KNOCK_S = 5.0


def knock(address: str) -> None:
    """See that somebody answers: Ray itself waits for minutes where nobody does.

    Raises:
        ConfigError: nobody does. An address that Ray resolves, as "auto", is taken as it is.
    """
    with boundary(_joining(address), ConfigError):
        answers(address)


def answers(address: str) -> None:
    """The same; nobody there is an OSError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    with socket.create_connection((host.rpartition("/")[2], int(port)), timeout=KNOCK_S):
        pass


def _joining(address: str) -> str:
    return f"joining the Ray cluster at {address} ({TOKEN})"


@contextmanager
def ray_cluster(address: str | None = None, *, environment: Mapping[str, str] = ENVIRONMENT) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one on this machine; leave or end it afterwards.

    Raises:
        ConfigError: no cluster answers at `address`.
    """
    if ray.is_initialized():
        yield
        return
    if address is not None:
        knock(address)
    with guarded(), _ray(address, environment):
        yield


@contextmanager
def _ray(address: str | None, environment: Mapping[str, str]) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    variables = {name: os.environ.get(name, value) for name, value in environment.items()}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with _signals_kept():
            if address is None:
                os.environ.update(variables)  # its processes inherit them, those that Ray starts ahead among them
                with boundary("starting Ray on this machine", ConfigError):
                    ray.init(address="local", include_dashboard=False, **options)
            else:
                with boundary(_joining(address), ConfigError):
                    ray.init(address=address, runtime_env={"env_vars": variables}, **options)
        yield
    finally:
        ray.shutdown()  # of half a Ray, too: an interrupt may come while it starts


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray installs a handler for SIGTERM, which ends the process without a word in status.json."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody install one, as Ray does
        native = {number: pythonapi.PyOS_getsig(c_int(number)) for number in numbers}
        try:
            yield
        finally:
            for number, address in native.items():
                pythonapi.PyOS_setsig(c_int(number), c_void_p(address))
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
