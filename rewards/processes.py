"""Processes that are really killed: for checks that may hang, eat the machine's memory or crash.

A thread cannot be stopped, and a library's own alarm does not fire inside one long integer operation. So a check runs
in a process of its own, which is sent SIGKILL, with all that it started, when its deadline passes.

    pool.run(request) -> Answer(value)          the function's answer
                      -> Answer(fault="...")    the request's fault: its check overran deadline or memory, or crashed
                      raises RewardError        ours: the process cannot start, the function raised, the machine stood

A crash or an exhausted memory counts only when it happens again in a fresh process; what another killed once is
nobody's fault. No process outlives its parent, however that ends: see rewards/child.py.
"""

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from millrace.core.errors import RewardError
from millrace.rewards.child import HEADER

START_S = 60.0
STARVED = 0.1  # a check that got less of its deadline as processor time did not overrun it by computing
CHECKS = 5000  # after so many a process is replaced: caches of libraries grow, and its memory is limited


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request."""

    value: Any = None  # what the function returned; plain JSON
    fault: str = ""  # what the check did to end its process; empty when it answered


class Pool:
    """Up to `processes` killable processes, started when they are first needed. Callable from any thread."""

    def __init__(
        self, target: str, *, setup: Mapping[str, Any], deadline_s: float, memory_bytes: int, processes: int
    ) -> None:
        """
        Args:
            target: "package.module:factory"; in the process, `factory(**setup)` makes the function of one request.
            setup: picklable; small.
            deadline_s: wall time of one check, the process's start not counted.
            memory_bytes: address space that a check may add to what the process has after its imports.
            processes: at most so many checks at the same time; further ones wait.
        """
        self._begin = (target, dict(setup), memory_bytes)
        self._deadline_s = deadline_s
        self._most = processes
        self._change = threading.Condition()
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._closed = False
        self._finalizer = weakref.finalize(self, _kill_all, self._all)  # also runs when the interpreter exits

    def run(self, request: Any) -> Answer:
        """Check one request; blocks until it is answered or its process is dead.

        Raises:
            RewardError: the process cannot start, the function raised, or the check got no processor time.
        """
        fault = ""
        for _ in range(2):
            process = self._acquired()
            keep = False
            try:
                process.wait_until_ready()
                answer = process.ask(request, self._deadline_s)
                keep = process.asked < CHECKS and "fault" not in answer  # with a fault it has ended
            except _Died as caught:
                fault = str(caught)
                continue
            except _Late as caught:
                if caught.cpu_s < STARVED * self._deadline_s:
                    raise RewardError(
                        f"{self._begin[0]} got {caught.cpu_s:.2f} s of processor time within deadline_s = "
                        f"{self._deadline_s:g}: the machine is too busy, or the check waits for something; "
                        "raise deadline_s, or lower the reward workers' concurrency"
                    ) from None
                return Answer(fault=f"took longer than deadline_s = {self._deadline_s:g}")
            finally:
                self._release(process, keep)
            if "fault" in answer:
                fault = answer["fault"]
                continue
            if "error" in answer:
                raise RewardError("\n".join(part for part in (answer["error"], answer.get("traceback", "")) if part))
            return Answer(value=answer["value"])
        return Answer(fault=fault)

    def close(self) -> None:
        """Kill every process, for good; checks under way raise RewardError."""
        with self._change:
            self._closed = True
            self._idle.clear()
            self._change.notify_all()
        _kill_all(self._all)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of its processes, idle ones too."""
        return tuple(sorted(process.pid for process in self._all.copy()))

    def _acquired(self) -> "_Process":
        with self._change:
            self._change.wait_for(lambda: self._closed or self._idle or len(self._all) < self._most)
            if self._closed:
                raise RewardError(f"the processes for {self._begin[0]} are closed")
            return self._idle.pop() if self._idle else self._started()

    def _started(self) -> "_Process":
        process = _Process(self._begin)
        self._all.add(process)
        return process

    def _release(self, process: "_Process", keep: bool) -> None:
        if not keep:
            process.kill()
            process.close()
        with self._change:
            if not keep:
                self._all.discard(process)
            if self._closed:
                process.kill()
            elif keep:
                self._idle.append(process)
            elif process.ready:
                self._idle.append(self._started())  # its imports run while others are checked
            self._change.notify()


class _Died(Exception):
    """The process ended during a check."""


class _Late(Exception):
    """The deadline passed."""

    def __init__(self, cpu_s: float) -> None:
        super().__init__(cpu_s)
        self.cpu_s = cpu_s


class _Process:
    """One child, its pipes, and how much of the processor it has used."""

    def __init__(self, begin: tuple[str, dict[str, Any], int]) -> None:
        self._target = begin[0]
        self.asked = 0
        self.ready = False
        self._cpu_s = 0.0
        self._killing = threading.Lock()
        # What this process can import, the child can, wherever that came from; nothing is put before it (-P).
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "millrace.rewards.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # a group of its own, so that what it starts dies with it
            )
        except OSError as caught:
            raise RewardError(f"the process for {self._target} cannot start: {caught}") from caught
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._requests, self._answers = self._popen.stdin.fileno(), self._popen.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._answers, False)
        self._begin = begin

    @property
    def pid(self) -> int:
        return self._popen.pid

    def wait_until_ready(self) -> None:
        """Raises RewardError with the cause when it cannot start."""
        if self.ready:
            return
        end = time.monotonic() + START_S
        try:
            self._send(self._begin, end)
            answer = self._receive(end)
        except _Late:
            raise RewardError(f"the process for {self._target} did not start within {START_S:g} s") from None
        except _Died as caught:
            raise RewardError(
                f"the process for {self._target} did not start: {caught}; what it wrote is in this worker's log"
            ) from None
        if "error" in answer:
            raise RewardError(f"the process for {self._target} did not start: {answer['error']}")
        self.ready = True

    def ask(self, request: Any, deadline_s: float) -> dict[str, Any]:
        """Raises _Died or _Late."""
        self.asked += 1
        end = time.monotonic() + deadline_s
        self._send(request, end)
        return self._receive(end)

    def kill(self) -> None:
        """It and what it started; returns when it is gone."""
        with self._killing:
            if self._popen.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._popen.pid, signal.SIGKILL)
                self._popen.wait()

    def close(self) -> None:
        """Its pipes; only for who asks it, or another thread could read a file that got the same number."""
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()

    def _send(self, message: Any, end: float) -> None:
        body = pickle.dumps(message)
        data = memoryview(HEADER.pack(len(body)) + body)
        while data:
            self._wait(self._requests, select.POLLOUT, end)
            try:
                data = data[os.write(self._requests, data) :]
            except BlockingIOError:
                continue
            except OSError:
                raise _Died(self._cause()) from None

    def _receive(self, end: float) -> dict[str, Any]:
        size = HEADER.unpack(self._exactly(HEADER.size, end))[0]
        answer: dict[str, Any] = json.loads(self._exactly(size, end))
        self._cpu_s = answer["cpu_s"]
        return answer

    def _exactly(self, size: int, end: float) -> bytes:
        parts = []
        while size:
            self._wait(self._answers, select.POLLIN, end)
            try:
                part = os.read(self._answers, min(size, 1 << 20))
            except BlockingIOError:
                continue
            if not part:
                raise _Died(self._cause())
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait(self, pipe: int, event: int, end: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            raise _Late(self._used_s())

    def _used_s(self) -> float:
        """Processor time since its last answer."""
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system) - self._cpu_s

    def _cause(self) -> str:
        self.kill()
        code = self._popen.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _kill_all(processes: set[_Process]) -> None:
    for process in processes.copy():
        process.kill()
        processes.discard(process)
