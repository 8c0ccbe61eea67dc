"""What runs in a killable process: reads a request, calls a function, writes its answer. See rewards/processes.py.

    python -m millrace.rewards.child        requests come in by stdin, pickled; answers leave by stdout, as JSON

Whatever the function prints goes to stderr. Nothing of torch, Ray or vLLM is imported here.
"""

import fcntl
import importlib
import json
import os
import pickle
import resource
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from millrace.core.errors import MillraceError, RewardError, boundary

HEADER = struct.Struct("!Q")


def main() -> int:
    """Serve until the parent closes its end, or a check leaves the process unfit for another."""
    requests, answers = _own_pipes()
    first = _received(requests)
    if first is None:
        return 0
    target, setup, memory_bytes = first
    try:
        _tie(requests, True)
        with boundary(f"{target} in a process of its own", RewardError):
            function = _loaded(target)(**setup)
    except MillraceError as caught:
        _send(answers, {"error": str(caught), "cpu_s": time.process_time()})
        return 1
    _tie(requests, False)
    _limit(memory_bytes)
    _send(answers, {"ready": True, "cpu_s": time.process_time()})
    while (request := _received(requests)) is not None:
        _tie(requests, True)
        answer = _answered(target, function, request)
        _tie(requests, False)
        _send(answers, {**answer, "cpu_s": time.process_time()})
        if "fault" in answer:
            return 1
    _end_group()
    return 0


def _answered(target: str, function: Callable[[Any], Any], request: Any) -> dict[str, Any]:
    try:
        with boundary(target, RewardError):
            try:
                value = function(request)
            except MemoryError:
                return {"fault": "ran out of memory"}
            except RecursionError:
                return {"fault": "nested too deeply"}
            json.dumps(value, default=_plain)
            return {"value": value}
    except MillraceError as caught:
        tail = "".join(traceback.format_exception(caught.__cause__)[-3:]) if caught.__cause__ else ""
        return {"error": str(caught), "traceback": tail}
    except SystemExit as caught:
        return {"error": f"{target} called exit({caught.code!r})"}


def _own_pipes() -> tuple[int, int]:
    """The two pipes under numbers of their own, so that user code's stdin and stdout are not the protocol's."""
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    fcntl.fcntl(requests, fcntl.F_SETOWN, -os.getpgrp())
    return requests, answers


def _tie(requests: int, tied: bool) -> None:
    """While user code runs, the kernel itself ends this process group when the parent's end of the pipe closes.

    A thread that waits for the end of the file would not do: one big integer operation holds the interpreter's
    lock for minutes. O_ASYNC sends SIGIO, whose default action ends the process; between checks, when requests
    arrive, it is off, and the end of the file is simply read.
    """
    flags = fcntl.fcntl(requests, fcntl.F_GETFL)
    fcntl.fcntl(requests, fcntl.F_SETFL, flags | os.O_ASYNC if tied else flags & ~os.O_ASYNC)
    if tied and _hung_up(requests):  # it closed before the kernel was asked to tell
        _end_group()


def _hung_up(requests: int) -> bool:
    poll = select.poll()
    poll.register(requests, select.POLLHUP)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def _end_group() -> None:
    """The parent is gone: this process, and what its checks left running, with it."""
    if os.getpgrp() == os.getpid():  # not where somebody starts it by hand
        os.killpg(0, signal.SIGKILL)


def _loaded(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _limit(memory_bytes: int) -> None:
    """A check may add so much address space to what is in use now that everything is imported."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # without /proc the deadline alone guards the machine
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _received(requests: int) -> Any:
    """The next request; None at the end of the file."""
    header = _exactly(requests, HEADER.size)
    if header is None:
        return None
    body = _exactly(requests, HEADER.unpack(header)[0])
    return None if body is None else pickle.loads(body)


def _exactly(requests: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(requests, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _send(answers: int, answer: dict[str, Any]) -> None:
    body = json.dumps(answer, default=_plain).encode()
    data = memoryview(HEADER.pack(len(body)) + body)
    while data:
        data = data[os.write(answers, data) :]


def _plain(value: Any) -> Any:
    """A number of another library as a plain one; what is no number as its text, which the judge then refuses."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else repr(value)


if __name__ == "__main__":
    sys.exit(main())
