"""The cable between the tests' two hosts does what it says."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.faults.hosts import FAR, NEAR, Hosts, beyond, can_be_made, joined

pytestmark = pytest.mark.faults

ECHO = (
    "import socket\n"
    f"far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); far.bind(('{FAR}', 7)); print('ready', flush=True)\n"
    "while True:\n"
    "    far.sendto(*far.recvfrom(100))\n"
)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if why := can_be_made():
        pytest.skip(why)
    with joined() as made:
        echo = subprocess.Popen([*beyond(made), sys.executable, "-c", ECHO], stdout=subprocess.PIPE)
        assert echo.stdout is not None and echo.stdout.readline()
        yield made
        echo.kill()
        echo.wait()


def back(many: int, within_s: float) -> list[float]:
    """Seconds until each of so many datagrams that were sent at once came back; those that came in time."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near:
        near.bind((NEAR, 0))
        began = time.monotonic()
        for number in range(many):
            near.sendto(str(number).encode(), (FAR, 7))
        found = []
        while len(found) < many and (left_s := began + within_s - time.monotonic()) > 0:
            near.settimeout(left_s)
            try:
                near.recv(100)
            except TimeoutError:
                break
            found.append(time.monotonic() - began)
    return found


def test_it_carries_and_delays_and_loses_and_can_be_pulled(hosts: Hosts) -> None:
    assert len(back(20, 5.0)) == 20
    hosts.worsen(delay_s=0.2, loss=0.0)
    time.sleep(0.1)
    slow = back(20, 5.0)
    assert len(slow) == 20 and min(slow) >= 0.4
    hosts.worsen(delay_s=0.0, loss=0.5)
    time.sleep(0.1)
    assert 5 < len(back(100, 2.0)) < 60  # a quarter comes back
    hosts.worsen(delay_s=0.0, loss=0.0)
    hosts.pull()
    assert back(5, 1.0) == []
    hosts.plug()
    time.sleep(0.5)
    assert back(5, 5.0)
