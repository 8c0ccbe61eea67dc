"""Looks at processes of one machine, and ends them. On other machines than the driver's it is an actor."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from millrace.cluster.supervise.policy import Vital

TICKS = os.sysconf("SC_CLK_TCK")


def vital(pid: int) -> Vital | None:
    """What the system says of a process; None where there is none, or it is dead and only not yet reaped.

    >>> vital(os.getpid()).stopped
    False
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    if fields[0] in "ZX":
        return None
    return Vital(stopped=fields[0] in "Tt", cpu_s=(int(fields[11]) + int(fields[12])) / TICKS)


def oom_kills() -> int:
    """Processes that the system ended for want of memory since it was started, of the machine or of a cgroup."""
    words = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(words.get("oom_kill", 0))  # kernels before 4.13 do not count


class Nurse:
    """Of one machine."""

    async def oom_kills(self) -> int:
        """See `oom_kills`."""
        return oom_kills()

    async def look(self, pid: int) -> Vital | None:
        """See `vital`."""
        return vital(pid)

    async def end(self, pid: int) -> None:
        """Kill a process; one that is stopped, too."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
