"""A second host for tests: a network namespace with a Ray node in it, behind a cable that can be pulled or made bad."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.faults.cable import device

OWN = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # others may have two hosts at the same time
NEAR, FAR, PORT = f"10.99.{OWN}.1", f"10.99.{OWN}.2", 6399 + OWN
STARTED = "This command will now block"
WAIT_S = 60.0
CURRENT = Path("/tmp/ray/ray_current_cluster")  # where Ray notes the last head that was started by hand
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


class Hosts:
    """The near one has the head and the driver, the far one engines."""

    def __init__(self, space: str) -> None:
        self.space, self.near, self.far = space, f"{space}-near", f"{space}-far"
        self._cable = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.cable", self.near, self.far],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = f"{NEAR}:{PORT}"
        assert self._cable.stdout is not None and self._cable.stdout.readline(), "there is no cable"

    def pull(self) -> None:
        """Nothing passes any more."""
        _ip("link", "set", self.near, "down")

    def plug(self) -> None:
        _ip("link", "set", self.near, "up")

    def worsen(self, *, delay_s: float, loss: float) -> None:
        """A bad line from now on, both ways."""
        assert self._cable.stdin is not None
        print(delay_s, loss, file=self._cable.stdin, flush=True)

    def end(self) -> None:
        """The cable, and both its ends."""
        self._cable.communicate()


def can_be_made() -> str:
    """Why there can be none here; "" where there can."""
    try:
        _ip("netns", "list")
        _ip("netns", "add", f"mr-try{OWN}")
        _ip("netns", "del", f"mr-try{OWN}")
        os.close(device(f"mr-try{OWN}"))
    except (OSError, subprocess.CalledProcessError) as caught:
        return f"no network namespace can be made here: {caught}"
    return ""


@contextmanager
def joined() -> Iterator[Hosts]:
    """Both, with a cable between them and nothing on them."""
    hosts = Hosts(f"mr{os.getpid() % 100_000}")
    try:
        _ip("netns", "add", hosts.space)
        try:
            _ip("link", "set", hosts.far, "netns", hosts.space)
            _ip("addr", "add", f"{NEAR}/24", "dev", hosts.near)
            inside = ("netns", "exec", hosts.space, "ip")
            _ip(*inside, "addr", "add", f"{FAR}/24", "dev", hosts.far)
            _ip(*inside, "link", "set", hosts.far, "up")
            _ip(*inside, "link", "set", "lo", "up")
            hosts.plug()
            yield hosts
        finally:
            _ip("netns", "del", hosts.space)
    finally:
        hosts.end()


def beyond(hosts: Hosts) -> tuple[str, ...]:
    """What begins a command that runs on the far one."""
    return ("ip", "netns", "exec", hosts.space)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Both, with a Ray cluster over them."""
    with joined() as hosts:
        nodes: list[subprocess.Popen[bytes]] = []
        try:
            head = ("--head", f"--node-ip-address={NEAR}", f"--port={PORT}", "--include-dashboard=false")
            nodes.append(_ray(folder / "near.log", (), head))
            join = (f"--address={hosts.address}", f"--node-ip-address={FAR}")
            nodes.append(_ray(folder / "far.log", beyond(hosts), join))
            yield hosts
        finally:
            for node in reversed(nodes):
                _end(node)
            if CURRENT.exists() and CURRENT.read_text().strip() == hosts.address:
                CURRENT.unlink()  # or whoever calls ray.init() next looks for this head


def _ray(log: Path, where: tuple[str, ...], options: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """A node that has started."""
    ray = str(Path(sys.executable).with_name("ray"))
    common = ("--num-cpus=1", "--object-store-memory=100000000", "--block")
    with log.open("wb") as file:
        node = subprocess.Popen([*where, ray, "start", *options, *common], stdout=file, stderr=file, env=ENVIRONMENT)
    deadline = time.monotonic() + WAIT_S
    while STARTED not in (said := log.read_text()):
        assert node.poll() is None and time.monotonic() < deadline, said[-2000:]
        time.sleep(0.1)
    return node


def _end(node: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    with suppress(psutil.NoSuchProcess):
        for each in psutil.Process(node.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    node.kill()
    node.wait()


def _ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True)
