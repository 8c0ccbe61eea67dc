"""A cable between two network devices that it makes: `python -m tests.faults.cable NEAR FAR`, until its input ends.

It says `ready` when both are there. A line `DELAY LOSS` on its input makes it bad: every frame then takes so many
seconds, either way, and this share of them is lost. The kernel's own means for that, netem, is in few kernels.
"""

import fcntl
import heapq
import os
import select
import struct
import sys
import time
from random import Random

TUNSETIFF, TAP, NO_HEADER = 0x400454CA, 0x0002, 0x1000
FRAME_BYTES = 65536


def device(name: str) -> int:
    """A network device whose frames are read from, and written to, what is returned."""
    opened = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(opened, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP | NO_HEADER))
    return opened


class Cable:
    """Frames on their way, between two ends."""

    def __init__(self, near: int, far: int) -> None:
        self._other = {near: far, far: near}
        self._way: list[tuple[float, int, int, bytes]] = []  # due, number, whereto, frame
        self._sent = 0
        self._random = Random(0)
        self.delay_s, self.loss = 0.0, 0.0

    def carry(self) -> None:
        """Until the input ends."""
        while True:
            wait_s = max(0.0, self._way[0][0] - time.monotonic()) if self._way else None
            ready, _, _ = select.select([*self._other, sys.stdin], [], [], wait_s)
            if sys.stdin in ready:
                words = sys.stdin.readline().split()
                if not words:
                    return
                self.delay_s, self.loss = map(float, words)
            for end in ready:
                if end in self._other:
                    self._take(end)
            while self._way and self._way[0][0] <= time.monotonic():
                _, _, end, frame = heapq.heappop(self._way)
                self._give(end, frame)

    def _take(self, end: int) -> None:
        try:
            while True:
                frame = os.read(end, FRAME_BYTES)
                self._sent += 1
                if self._random.random() >= self.loss:
                    due = time.monotonic() + self.delay_s
                    heapq.heappush(self._way, (due, self._sent, self._other[end], frame))
        except OSError:  # there is no more, or the device is down
            return

    def _give(self, end: int, frame: bytes) -> None:
        try:
            os.write(end, frame)
        except OSError:  # it is down, or full: lost, as on any cable
            return


def main(near: str, far: str) -> None:
    """Make both devices, and carry."""
    cable = Cable(device(near), device(far))
    print("ready", flush=True)
    cable.carry()


if __name__ == "__main__":
    main(*sys.argv[1:])
