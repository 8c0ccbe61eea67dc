"""The process that drives one job: checks it, starts Ray, runs it, and listens for the order to stop.

`Job` starts it as `python -m millrace.cluster.driver SOCKET DIRECTORY` in a session of its own; the request comes
over the socket, and one answer goes back when the run was checked: it is on its way, or why not.
"""

import json
import os
import socket
import sys
import traceback
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

from millrace.cluster import guard, run_directory
from millrace.cluster.ahead import Ahead
from millrace.cluster.ears import INTERRUPTED, Brake, Driven, Ears
from millrace.cluster.lines import Lines
from millrace.core.errors import MillraceError


def main(file: int) -> int:
    """Drive the job that the socket asks for. Returns the exit status, as the command line's."""
    link = socket.socket(fileno=file)
    link.set_inheritable(False)
    ears = Ears(link)
    ears.start()
    with link.makefile("rb") as lines:
        request: dict[str, Any] = json.loads(lines.readline())
    sys.path[:] = request["path"]
    ahead = Ahead()
    try:
        if request["address"] is not None:
            import_module("millrace.cluster.runtime").knock(request["address"])
        configs = import_module("millrace.cluster.config")
        config = configs.of(request["config"], root=Path("/"), source="the job's configuration")
        if request["address"] is None and not request["local"]:
            ahead.begin(config)
        _drive(config, request, link, ears, ahead)
    except MillraceError as caught:
        traceback.print_exc()
        _answer(link, {"kind": type(caught).__name__, "message": str(caught)})
        ahead.abandon(1)
        return 1
    except KeyboardInterrupt:
        ahead.abandon(INTERRUPTED)
        return INTERRUPTED
    return 0


def _drive(config: Any, request: dict[str, Any], link: socket.socket, ears: Ears, ahead: Ahead) -> None:
    jobs = import_module("millrace.cluster.jobs")  # and with it torch: seconds, in which the ears are open
    with jobs.ready(config, resume=request["resume"], mark=os.environ.get(guard.MARK)) as (plan, snapshot):
        brake = Brake()
        with closing(Lines(config.directory / run_directory.PROGRESS_LOG)) as log:

            def say(line: str) -> None:
                log.write(line)

            ears.listen_for(Driven(snapshot, brake, say), attached=request["attached"])
            _answer(link, None)
            _print_into(config.directory / run_directory.DRIVER_LOG)
            jobs.execute(
                plan,
                snapshot,
                address=request["address"],
                local=request["local"],
                resume=request["resume"],
                say=say,
                brake=brake,
                ahead=ahead,
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


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
