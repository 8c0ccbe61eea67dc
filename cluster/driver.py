"""The process that drives one job: checks it, starts Ray, runs it, and listens for the order to stop.

`Job` starts it as `python -m millrace.cluster.driver SOCKET DIRECTORY` in a session of its own; the request comes
over the socket, and one answer goes back when the run was checked: it is on its way, or why not.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from millrace.cluster import config as configs
from millrace.cluster import jobs, run_directory
from millrace.cluster.config import RunConfig
from millrace.cluster.jobs import Brake, Say
from millrace.cluster.runtime import knock
from millrace.cluster.snapshot import Snapshot
from millrace.core.errors import MillraceError

POLL_S = 0.25
NOW_S = 10.0  # that a run which is told to end at once may take for it


def main(file: int) -> int:
    """Drive the job that the socket asks for. Returns the exit status, as the command line's."""
    link = socket.socket(fileno=file)
    link.set_inheritable(False)
    # An order in words may come at any time; before the run listens, a signal is a plain interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with link.makefile("rb") as lines:
        request: dict[str, Any] = json.loads(lines.readline())
    sys.path[:] = request["path"]
    try:
        if request["address"] is not None:
            knock(request["address"])
        config = configs.of(request["config"], root=Path("/"), source="the job's configuration")
        _drive(config, request, link)
    except MillraceError as caught:
        traceback.print_exc()
        _answer(link, {"kind": type(caught).__name__, "message": str(caught)})
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _drive(config: RunConfig, request: dict[str, Any], link: socket.socket) -> None:
    with jobs.ready(config, resume=request["resume"]) as (plan, snapshot):
        _answer(link, None)
        _print_into(config.directory / run_directory.DRIVER_LOG)
        brake = Brake()
        with (config.directory / run_directory.PROGRESS_LOG).open("a", buffering=1, encoding="utf-8") as log:

            def say(line: str) -> None:
                log.write(line + "\n")

            listener = threading.Thread(
                target=_listen, args=(link if request["attached"] else None, snapshot, brake, say), daemon=True
            )
            listener.start()
            jobs.execute(
                plan,
                snapshot,
                address=request["address"],
                local=request["local"],
                resume=request["resume"],
                say=say,
                brake=brake,
            )


def _answer(link: socket.socket, error: dict[str, str] | None) -> None:
    """The one answer. Whoever asked may have ended, and heard all that matters, in the meantime."""
    try:
        link.sendall(json.dumps({"error": error}).encode() + b"\n")
    except OSError:
        if error is None:
            raise KeyboardInterrupt from None  # nobody knows of this run


def _print_into(path: Path) -> None:
    """What this process and its children print from now on goes there."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)


def _listen(link: socket.socket | None, snapshot: Snapshot, brake: Brake, say: Say) -> None:
    """Hear the order to stop, and the end of the process that the run is attached to."""
    directory = Path(snapshot.status.id)
    heard: str | None = None
    while not brake.released:
        if link is None:
            time.sleep(POLL_S)
        elif select.select([link], [], [], POLL_S)[0]:
            link = None  # it never says anything, so it has ended
            if heard is None:
                say("the process that started this run has ended")
                brake.pull(now=False)
        order = run_directory.ordered_to_stop(directory)
        if order is None or order == heard:
            continue
        heard = order
        brake.pull(now=order == "now")
        if order == "now":
            _end_at_once(snapshot, brake)


def _end_at_once(snapshot: Snapshot, brake: Brake) -> None:
    """What does not end when it is told to is ended."""
    if not brake.connected:
        os.kill(os.getpid(), signal.SIGINT)  # still starting
    deadline = time.monotonic() + NOW_S
    while time.monotonic() < deadline:
        if brake.released:
            return
        time.sleep(POLL_S)
    snapshot.update(state="stopped", eta_s=None, waits={})
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
