"""A second host for tests: a network namespace with a Ray node in it, behind a cable that can be pulled."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

NEAR, FAR, PORT = "10.99.0.1", "10.99.0.2", 6399
STARTED = "This command will now block"
WAIT_S = 60.0
CURRENT = Path("/tmp/ray/ray_current_cluster")  # where Ray notes the last head that was started by hand
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


class Hosts:
    """The near one has the head and the driver, the far one engines."""

    def __init__(self, space: str) -> None:
        self._space = space
        self._cable = f"{space}-near"
        self.address = f"{NEAR}:{PORT}"

    def pull(self) -> None:
        """Nothing passes any more."""
        _ip("link", "set", self._cable, "down")

    def worsen(self, *how: str) -> str:
        """A bad line, as `tc netem` has it: "delay", "200ms". Returns why there can be none here; "" when done."""
        command = ("tc", "qdisc", "add", "dev", self._cable, "root", "netem", *how)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return f"no line can be made worse here: {done.stderr.strip()}" if done.returncode else ""

    def plug(self) -> None:
        _ip("link", "set", self._cable, "up")


def can_be_made() -> str:
    """Why there can be none here; "" where there can."""
    try:
        _ip("netns", "list")
        _ip("netns", "add", "mr-try")
        _ip("netns", "del", "mr-try")
    except (OSError, subprocess.CalledProcessError) as caught:
        return f"no network namespace can be made here: {caught}"
    return ""


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Both, with a Ray cluster over them."""
    hosts = Hosts(f"mr{os.getpid() % 100_000}")
    space, near, far = hosts._space, hosts._cable, f"{hosts._space}-far"
    inside = ("netns", "exec", space, "ip")
    _ip("netns", "add", space)
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        _ip("link", "add", near, "type", "veth", "peer", "name", far)
        _ip("link", "set", far, "netns", space)
        _ip("addr", "add", f"{NEAR}/24", "dev", near)
        _ip(*inside, "addr", "add", f"{FAR}/24", "dev", far)
        _ip(*inside, "link", "set", far, "up")
        _ip(*inside, "link", "set", "lo", "up")
        hosts.plug()
        head = ("--head", f"--node-ip-address={NEAR}", f"--port={PORT}", "--include-dashboard=false")
        nodes.append(_ray(folder / "near.log", (), head))
        join = (f"--address={hosts.address}", f"--node-ip-address={FAR}")
        nodes.append(_ray(folder / "far.log", ("ip", "netns", "exec", space), join))
        yield hosts
    finally:
        for node in reversed(nodes):
            _end(node)
        if CURRENT.exists() and CURRENT.read_text().strip() == hosts.address:
            CURRENT.unlink()  # or whoever calls ray.init() next looks for this head
        _ip("netns", "del", space)


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
