"""Calls that stay on one machine go over a Unix socket, beside Ray (benchmarks/README.md, P1, says what that saves).

A frame is a head, a pickle, and the large buffers of its objects as they lie in memory. One that is more than a
socket takes at once goes as a file in memory, which the receiver maps: neither end waits for the other, and what
`core.memory` gave out, or was lent itself, is not copied at all. Sockets have abstract names, which end with their
process, and talk to processes of the same user alone: whoever they could harm by a pickle is who sends it.
"""

import array
import asyncio
import os
import pickle
import secrets
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from itertools import count, islice, takewhile
from typing import Any

import pyarrow as pa

from millrace.core import memory
from millrace.core.errors import MillraceError, boundary

HEAD = struct.Struct("<QIII")  # number of the call, bytes of the pickle with the places in front of it, buffers, files
PLACE = struct.Struct("<Qq")  # of a buffer: its bytes, and where it begins in the next of the frame's files; or HERE
HERE = -1  # among the frame's own bytes
MOST_FILES = 128  # of a frame; the system takes 253 at once
FILES_SPACE = socket.CMSG_SPACE(MOST_FILES * struct.calcsize("i"))
AT_ONCE_BYTES = 4 << 20  # that are read before others in the event loop have their turn
PARTS = 64  # of a single write
PEER = struct.Struct("3i")  # process, user and group of who is at the other end
BACKLOG = 128
SHOWN = 200  # characters of what cannot be sent


class Cut(ConnectionError):
    """The process at the other end is gone."""


class Wire:
    """One end of a connection, in one event loop."""

    def __init__(
        self, link: socket.socket, *, heard: Callable[["Wire", int, Callable[[], Any]], None], cut: Callable[[], None]
    ) -> None:
        """
        Args:
            heard: gets each frame's number, and what makes its object or raises what keeps it from being made.
            cut: called once, when the connection ends.
        """
        link.setblocking(False)
        self._link, self._heard, self._cut = link, heard, cut
        self._loop = asyncio.get_running_loop()
        self._parts: deque[tuple[memoryview, Sequence[int]]] = deque()  # still to be sent, with the files of a frame
        self._blocked = False  # until the other end has read some of it
        self._begin()
        self.open = True
        self._loop.add_reader(link.fileno(), self._readable)

    def send(self, number: int, value: Any) -> None:
        """Raises what pickle raises, or an OSError where there is no memory for it, with nothing sent."""
        buffers: list[pickle.PickleBuffer] = []
        body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        places, files, here = _placed([buffer.raw() for buffer in buffers])
        head = HEAD.pack(number, len(places) + len(body), len(buffers), len(files))
        waiting = bool(self._parts)
        self._parts.append((memoryview(head + places + body), files))
        self._parts.extend((view, ()) for view in here if len(view))
        if not waiting:
            self._writable()

    def _writable(self) -> None:
        try:
            while self._parts and self.open:
                first, files = self._parts[0]
                if not files:
                    plain = takewhile(lambda part: not part[1], islice(self._parts, PARTS))
                    self._sent(self._link.sendmsg([view for view, _ in plain]))
                    continue
                many = socket.send_fds(self._link, [first], files)  # they go with the first byte
                self._parts[0] = first, ()
                _close(files)
                self._sent(many)
        except BlockingIOError:
            if not self._blocked:
                self._loop.add_writer(self._link.fileno(), self._writable)
            self._blocked = True
            return
        except OSError:
            self.close()
        if self._blocked and self.open:
            self._loop.remove_writer(self._link.fileno())
        self._blocked = False

    def _sent(self, many: int) -> None:
        while many:
            first, files = self._parts.popleft()
            if len(first) > many:
                self._parts.appendleft((first[many:], files))
                return
            many -= len(first)

    def _begin(self) -> None:
        """A head is next."""
        self._head = bytearray(HEAD.size)
        self._body: bytearray | None = None
        self._buffers: list[pa.Buffer] = []
        self._files: list[int] = []
        self._targets = deque([memoryview(self._head)])  # to be filled, one after the other

    def _readable(self) -> None:
        left = AT_ONCE_BYTES
        try:
            while left > 0 and self.open:
                many = self._received(self._targets[0])
                if not many:
                    self.close()
                    return
                left -= many
                self._targets[0] = self._targets[0][many:]
                while self.open and not self._targets[0]:
                    self._filled()
        except BlockingIOError:
            return
        except OSError:
            self.close()

    def _received(self, target: memoryview) -> int:
        """Bytes of it. Files come with a head alone, and no target reaches into the next frame."""
        if self._body is not None:
            return self._link.recv_into(target)
        many, told, _, _ = self._link.recvmsg_into([target], FILES_SPACE, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in told:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._files += array.array("i", data)
        return many

    def _filled(self) -> None:
        """One target is full: what comes next follows from what it held."""
        self._targets.popleft()
        number, size, buffers, files = HEAD.unpack(self._head)
        if self._body is None:
            if files != len(self._files):
                raise OSError(f"{len(self._files)} files came with a frame that has {files}")
            self._body = bytearray(size)
            self._targets.append(memoryview(self._body))
            return
        if len(self._buffers) < buffers:
            for each, at in PLACE.iter_unpack(memoryview(self._body)[: buffers * PLACE.size]):
                if at == HERE:
                    self._buffers.append(pa.allocate_buffer(each))
                    self._targets.append(memoryview(self._buffers[-1]).cast("B"))
                else:
                    self._buffers.append(memory.borrowed(self._files.pop(0), at, each))
        while self._targets and not self._targets[0]:
            self._targets.popleft()
        if self._targets:
            return
        body, held = memoryview(self._body)[buffers * PLACE.size :], self._buffers
        self._begin()
        self._heard(self, number, partial(pickle.loads, body, buffers=[memoryview(each).toreadonly() for each in held]))

    def close(self) -> None:
        """No more of it; `cut` is told."""
        if not self.open:
            return
        self.open = False
        for files in (self._files, *(files for _, files in self._parts)):
            _close(files)
        self._files = []
        self._parts.clear()
        self._loop.remove_reader(self._link.fileno())
        self._loop.remove_writer(self._link.fileno())
        self._link.close()
        self._cut()


def _placed(views: Sequence[memoryview]) -> tuple[bytes, list[int], list[memoryview]]:
    """The places of these buffers, the files they go in, and those that go among the frame's own bytes."""
    places: list[bytes] = []
    files: list[int] = []
    here: list[memoryview] = []
    for view in views:
        large = len(view) >= memory.LEAST_BYTES and len(files) < MOST_FILES
        lent = _lent(pa.py_buffer(view)) if large else None
        if lent is not None:
            files.append(lent[0])
        else:
            here.append(view)
        places.append(PLACE.pack(len(view), HERE if lent is None else lent[1]))
    return b"".join(places), files, here


def _lent(buffer: pa.Buffer) -> tuple[int, int] | None:
    """Where it lies, or a copy of it does that can be lent. None: it can be sent all the same."""
    lent = memory.lend(buffer)
    if lent is None:
        copy = memory.buffer(buffer.size)
        memoryview(copy).cast("B")[:] = memoryview(buffer).cast("B")
        lent = memory.lend(copy)
    return lent


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


class Door:
    """Where this process is called, in the event loop that it is made in."""

    def __init__(self, call: Callable[[str, Sequence[Any], dict[str, Any]], Coroutine[Any, Any, Any]]) -> None:
        """Args: call: answers a method, its arguments, and those by name."""
        self._call = call
        self._loop = asyncio.get_running_loop()
        self.address = f"millrace-{os.getpid()}-{secrets.token_hex(16)}"
        self._wires: set[Wire] = set()
        self._working: set[asyncio.Task[Any]] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.setblocking(False)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(BACKLOG)
        self._loop.add_reader(self._listener.fileno(), self._knocked)

    def _knocked(self) -> None:
        try:
            link, _ = self._listener.accept()
        except OSError:  # who knocked has gone again
            return
        if not same_user(link):
            link.close()
            return
        wire = Wire(link, heard=self._asked, cut=lambda: self._wires.discard(wire))
        self._wires.add(wire)

    def _asked(self, wire: Wire, number: int, request: Callable[[], Any]) -> None:
        task = self._loop.create_task(self._called(request))
        self._working.add(task)
        task.add_done_callback(lambda done: self._answer(wire, number, done))

    async def _called(self, request: Callable[[], tuple[str, Sequence[Any], dict[str, Any]]]) -> Any:
        return await self._call(*request())

    def _answer(self, wire: Wire, number: int, done: asyncio.Task[Any]) -> None:
        self._working.discard(done)
        if done.cancelled():
            outcome: tuple[Any, BaseException | None] = None, Cut("the call was cancelled: its process ends")
        else:
            error = done.exception()
            outcome = (None, error) if error is not None else (done.result(), None)
        if not wire.open:  # whoever asked is gone, and repeats it in another life
            return
        try:
            with boundary("pickling it", MillraceError):
                wire.send(number, outcome)
        except MillraceError as caught:
            wire.send(number, (None, RuntimeError(f"{str(outcome)[:SHOWN]} cannot be sent: {caught}")))

    def close(self) -> None:
        """Nobody comes in any more, and who is in is sent away."""
        if self._listener.fileno() < 0:
            return
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for wire in tuple(self._wires):
            wire.close()


class Caller:
    """Calls what is behind a door, from one event loop."""

    def __init__(self, address: str) -> None:
        """Raises OSError: there is no such door, or it is another user's."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            link.connect(f"\0{address}")
            if not same_user(link):
                raise PermissionError(f"{address} is a socket of another user")
        except OSError:
            link.close()
            raise
        self._numbers = count()
        self._asked: dict[int, asyncio.Future[Callable[[], Any]]] = {}
        self._wire = Wire(link, heard=self._answered, cut=self._cut)

    @property
    def open(self) -> bool:
        """Whether the process at the other end was there, last."""
        return self._wire.open

    async def call(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the component answers, or raises.

        Raises:
            Cut: its process is gone.
        """
        if not self.open:
            raise Cut("the connection has ended")
        number = next(self._numbers)
        asked = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._wire.send(number, (method, args, kwargs))
            outcome: tuple[Any, BaseException | None] = (await asked)()
        finally:
            self._asked.pop(number, None)
        answer, error = outcome
        if error is not None:
            raise error
        return answer

    def _answered(self, wire: Wire, number: int, outcome: Callable[[], Any]) -> None:
        asked = self._asked.get(number)
        if asked is not None and not asked.done():  # otherwise who asked has given up
            asked.set_result(outcome)

    def _cut(self) -> None:
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(Cut("the connection ended"))


class Lines:
    """The connections to one component, one for each event loop of this process that calls it."""

    def __init__(self, door: Callable[[], Awaitable[str]]) -> None:
        """Args: door: asks for its address, on a way that is always there; "" if it is on another machine."""
        self._door = door
        self._opened: dict[asyncio.AbstractEventLoop, asyncio.Task[Caller | None]] = {}

    async def caller(self) -> Caller | None:
        """Of the running loop. None where the door cannot be reached: on another machine, or in another container.

        Raises:
            What `door` raises.
        """
        loop = asyncio.get_running_loop()
        opened = self._opened.get(loop)
        if opened is None or not _of_use(opened):
            self._opened = {each: task for each, task in self._opened.items() if not each.is_closed()}
            opened = self._opened[loop] = loop.create_task(self._open())
        return opened.result() if opened.done() else await asyncio.shield(opened)

    async def _open(self) -> Caller | None:
        address = await self._door()
        try:
            return Caller(address) if address else None
        except OSError:
            return None


def _of_use(opened: asyncio.Task[Caller | None]) -> bool:
    """Whether a connection is being made, or is there, or there can be none."""
    if not opened.done():
        return True
    if opened.cancelled() or opened.exception() is not None:
        return False
    caller = opened.result()
    return caller is None or caller.open


def same_user(link: socket.socket) -> bool:
    """Whether the process at the other end has this one's user."""
    user: int = PEER.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))[1]
    return user == os.geteuid()
