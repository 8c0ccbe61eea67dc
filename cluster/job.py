"""A job: one run in a process of its own, which goes on when the one that submitted it has ended.

    from millrace import Job, RunConfig

    job = Job.submit(RunConfig.load("run.toml"))
    for row in job.metrics(follow=True):
        print(row["step"], row.get("reward/mean"))
    print(job.result()["held_out"])

A job is its run directory. All that a Job says comes from the files there, so that it can be attached to from any
process, on any machine that sees them.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from millrace.cluster import config as configs
from millrace.cluster import guard, run_directory, snapshot
from millrace.cluster.config import RunConfig
from millrace.cluster.snapshot import Failure, Status
from millrace.core import errors
from millrace.core.errors import ConfigError, DeadlineError, MillraceError, nearest

RUNS = Path("runs")  # where an id that is no path is looked for
LEAVE_S = 10.0  # for a driver whose run has ended, or is not to begin, to end, too
WORDS = 12  # last lines of a driver that ended before it could say why

_drivers: list[subprocess.Popen[bytes]] = []  # of this process; each is asked now and then, so that none stays a zombie
_links: list[socket.socket] = []  # to attached drivers: they close when this process ends, and not before


class Job:
    """A run, wherever it is driven. Make one with `submit`, `resume` or `attach`."""

    def __init__(self, directory: Path, *, said: int = 0) -> None:
        self.directory = directory
        self.said = said  # bytes of progress.log that were read, or are of earlier incarnations

    @property
    def id(self) -> str:
        """The run directory, absolute."""
        return str(self.directory)

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    @classmethod
    def submit(
        cls, config: RunConfig, address: str | None = None, *, local: bool = False, attached: bool = False
    ) -> Self:
        """Start a run. Returns when its configuration has been checked and the run is on its way.

        Args:
            address: of a running Ray cluster; the driver stays on this machine and connects to it. Without it the
                driver starts Ray here, for this run.
            local: the whole run in the driver's process, without Ray.
            attached: the run ends in order, with a checkpoint, when this process ends; otherwise it goes on.
        Raises:
            ConfigError, DataError, ModelError, RecipeError, RewardError: the run cannot start; nothing was changed.
        """
        if not isinstance(config, RunConfig):
            raise ConfigError(
                f"Job.submit takes a RunConfig, not {config!r}: RunConfig.load(path) makes one of a file, "
                "RunConfig(...) of keywords"
            )
        return cls._start(configs.anchored(config, Path.cwd()), address, local, attached, resume=False)

    @classmethod
    def resume(cls, id: str | Path, address: str | None = None, *, local: bool = False, attached: bool = False) -> Self:
        """Continue a run that ended early from its last commit, with the configuration it has. A finished one stays.

        Raises:
            ConfigError: it is no run, it is being run, or it was moved.
        """
        directory = found(id)
        config = configs.of_directory(directory)
        if config.directory.resolve() != directory.resolve():
            raise ConfigError(f"{id} was moved: its config.toml says {config.directory}; move it back there")
        if run_directory.finished(directory, steps=config.loop.steps) is not None:
            return cls(config.directory)
        return cls._start(config, address, local, attached, resume=True)

    @classmethod
    def attach(cls, id: str | Path) -> Self:
        """A job that was submitted elsewhere.

        Args:
            id: its run directory, or the name of a run below ./runs.
        Raises:
            ConfigError: there is no such run.
        """
        return cls(found(id))

    @classmethod
    def _start(cls, config: RunConfig, address: str | None, local: bool, attached: bool, *, resume: bool) -> Self:
        if local and address is not None:
            raise ConfigError(f"a local run needs no Ray, and joins no cluster at {address}: leave out one of the two")
        directory = config.directory
        run_directory.wait_for_remains(directory)
        if run_directory.is_held(directory):
            raise ConfigError(run_directory.in_use(directory))
        log = directory / run_directory.PROGRESS_LOG
        said = log.stat().st_size if resume and log.exists() else 0
        request = {
            "config": config.model_dump(mode="json", exclude_unset=True),
            "address": address,
            "local": local,
            "attached": attached,
            "resume": resume,
            "path": sys.path,
        }
        link = _driver(request, directory, to_cluster=address is not None)
        if attached:
            _links.append(link)
        else:
            link.close()
        return cls(directory, said=said)

    @property
    def ended(self) -> bool:
        """Whether nothing drives it any more."""
        return not run_directory.is_held(self.directory)

    def status(self) -> Status:
        """What it does right now. A driver that ended without a word has failed.

        Raises:
            ConfigError: the run has never begun.
        """
        held = not self.ended
        status = snapshot.read(self.directory)
        if status is None:
            if held:
                return Status(id=self.id, state="starting", name=self.directory.name)
            raise ConfigError(f"{self.directory}: its run has never begun, it has no {snapshot.FILE}")
        if held or status.ended or not self.ended:
            return status
        return snapshot.lost(status)

    def metrics(self, follow: bool = False) -> Iterator[Mapping[str, Any]]:
        """The rows of metrics.jsonl: one per step, and one per held-out evaluation, which has `held_out`.

        Args:
            follow: yield further rows as they come, until the job ends. Steps that are made again, by a job that was
                resumed meanwhile, come again.
        """
        return self._rows(run_directory.METRICS, follow)

    def events(self, follow: bool = False) -> Iterator[Mapping[str, Any]]:
        """The rows of events.jsonl: who joined, left, failed, and why; of all incarnations."""
        return self._rows(run_directory.EVENTS, follow)

    def lines(self) -> Iterator[str]:
        """The lines of progress that a person reads, as they come, until the job ends."""
        for line in run_directory.follow(
            self.directory / run_directory.PROGRESS_LOG, lambda: self.ended, offset=self.said
        ):
            self.said += len(line) + 1
            yield line.decode(errors="replace")

    def _rows(self, name: str, follow: bool) -> Iterator[Mapping[str, Any]]:
        for line in run_directory.follow(self.directory / name, lambda: not follow or self.ended):
            yield json.loads(line)

    def stop(self, *, now: bool = False) -> None:
        """Ask it to end: in order, after the step under way and with a checkpoint, or at once. Does not wait."""
        if not self.ended:
            run_directory.order_stop(self.directory, now=now)

    def wait(self, timeout_s: float | None = None) -> Status:
        """Wait until it has ended, finished or stopped.

        Raises:
            MillraceError: it failed; of the class that its driver raised.
            DeadlineError: it goes on after `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.ended:
            if deadline is not None and time.monotonic() > deadline:
                raise DeadlineError(
                    f"{self.directory} has not ended within {timeout_s:g} s: wait longer, or stop it with .stop()"
                )
            time.sleep(run_directory.POLL_S)
        status = self.status()
        _see_off(status.pid)
        if status.error is not None:
            raise raised(status.error)
        return status

    def result(self) -> Mapping[str, Any]:
        """What result.json holds.

        Raises:
            ConfigError: there is none, because the job goes on, failed, or was stopped at once.
        """
        status = self.status()
        try:
            found: Mapping[str, Any] = json.loads((self.directory / run_directory.RESULT).read_text())
        except FileNotFoundError:
            after = f"state {status.state}, step {status.step} of {status.steps}"
            why = f": {status.error['message']}" if status.error else "; .wait() for it" if not status.ended else ""
            raise ConfigError(f"{self.directory} has no result ({after}){why}") from None
        return found


def found(id: str | Path) -> Path:
    """The run directory, absolute, that an id names.

    Raises:
        ConfigError: there is none.
    """
    path = Path(id).expanduser()
    for directory in (path, RUNS / path):
        if (directory / run_directory.CONFIG).is_file():
            return Path(os.path.abspath(directory))
    known = [directory.name for directory in all_below(RUNS)]
    if path.is_dir():
        raise ConfigError(
            f"{id}: is no run directory, it has no {run_directory.CONFIG}; give the one that holds the run"
        )
    raise ConfigError(f"{id}: there is no such run, neither as a path nor below {RUNS}/{nearest(str(id), known)}")


def all_below(runs: Path) -> list[Path]:
    """The run directories in a directory, the newest last."""
    entries = runs.iterdir() if runs.is_dir() else iter(())
    configured = [(file.stat().st_mtime, file.parent) for entry in entries if (file := entry / "config.toml").is_file()]
    return [directory for _, directory in sorted(configured)]


def raised(error: Failure) -> MillraceError:
    """The error that the driver raised, by its class.

    >>> raised({"kind": "RecipeError", "message": "unknown recipe"})
    RecipeError('unknown recipe')
    """
    kind = getattr(errors, error["kind"], None)
    if isinstance(kind, type) and issubclass(kind, MillraceError):
        return kind(error["message"])
    return MillraceError(error["message"])


def show_token(environment: MutableMapping[str, str], file: Path) -> None:
    """Ray's clusters ask for a token unless told not to, and Ray reads the mode once, when it is imported."""
    if file.is_file() or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & environment.keys():
        environment.setdefault("RAY_AUTH_MODE", "token")


def _driver(request: Mapping[str, Any], directory: Path, *, to_cluster: bool) -> socket.socket:
    """Start the driver, and hear whether the run can start. Returns the link to it."""
    environment = {**os.environ, **guard.PLAIN, guard.RUN: str(directory), guard.MARK: guard.fresh_mark()}
    if to_cluster:
        show_token(environment, Path.home() / ".ray" / "auth_token")
    ours, theirs = socket.socketpair()
    with theirs, tempfile.TemporaryFile() as words:
        # -P: a queue.py or random.py beside the user is not the standard library's.
        command = [sys.executable, "-P", "-m", "millrace.cluster.driver", str(theirs.fileno()), str(directory)]
        process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            start_new_session=True,  # the terminal's Ctrl-C is the submitter's
        )
        theirs.close()
        _reap()
        _drivers.append(process)
        try:
            ours.sendall(json.dumps(request).encode() + b"\n")
            answer = _line(ours)
        except ConnectionError:
            answer = b""
        except BaseException:
            process.terminate()
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LEAVE_S)
            finally:  # another interrupt does not wait
                process.kill()
            raise
        if not answer:
            raise MillraceError(_unsaid(process, words))
    error: Failure | None = json.loads(answer)["error"]
    if error is not None:
        process.wait()
        raise raised(error)
    return ours


def _line(link: socket.socket) -> bytes:
    """One line, or nothing where the other end closed."""
    got = b""
    while not got.endswith(b"\n"):
        if not (more := link.recv(65536)):
            return b""
        got += more
    return got


def _unsaid(process: subprocess.Popen[bytes], words: IO[bytes]) -> str:
    status = process.wait()
    words.seek(0)
    last = words.read().decode(errors="replace").splitlines()[-WORDS:]
    return "\n".join([f"the driver ended with status {status} before it had checked the run:", *last])


def _see_off(pid: int) -> None:
    """Wait until the process of a run that has ended is gone, if it is ours: its interpreter takes a while to end."""
    for process in _drivers:
        if process.pid == pid:
            with suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE_S)
    _reap()


def _reap() -> None:
    _drivers[:] = [process for process in _drivers if process.poll() is None]
