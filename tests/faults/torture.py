"""Real kills of a real queue, by the hundred: forked from a process that has everything imported, killed at once.

    python -m tests.faults.torture --kills 500 --seed 0 --directory /some/where

One run after the other, each with settings of its own (torture_plan.Plan); in each the process (torture_life.Life) is
killed at a failpoint or at some time, and restarted at once, until the run has ended; then torture_check reads what it
left. Engines, judges and the learner die with the queue, or outlive it and repeat their last call. The last line is a
JSON object; the exit status is 1 where something was found.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from millrace.core import failpoint
from tests.faults import torture_check, torture_plants
from tests.faults.torture_life import Crash, Life, Trigger
from tests.faults.torture_plan import FAILPOINTS, SOFT, Memory, Plan

KILLS_PER_RUN = 20
ALARM_S = 90
NAMES = ("learner", "generation-0", "generation-1", "reward-0", "reward-1")


class Found(Exception):
    """Something does not hold."""


def child(work: Callable[[], None], error: Path) -> int:
    """Run it in a fork of this process. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(ALARM_S)
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - it goes to the parent as text
        error.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def ended(pid: int, error: Path) -> bool:
    """Wait for a child: True where it came to its end, False where it was killed. Raises Found for any other end."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise Found(error.read_text() if error.exists() else f"the process ended with status {status}")
    return True


def kill_self(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash(name: str) -> None:
    raise Crash(name)


class Torture:
    """Args: kills: at least so many, over as many runs as it takes; at: the failpoints."""

    def __init__(self, directory: Path, *, kills: int, seed: int, plant: str, at: Sequence[str]) -> None:
        self.directory, self.kills, self.plant, self.at = directory, kills, plant, at
        self.rng = random.Random(seed)
        self.seed = seed
        self.by: Counter[str] = Counter()
        self.redone = self.runs = self.crashes = self.spoilt = 0

    @property
    def total(self) -> int:
        return sum(self.by.values())

    def run(self) -> None:
        while self.total < self.kills or not all(self.by[name] for name in self.at):
            if self.runs > self.kills:
                raise Found(f"failpoints that nothing reaches: {[name for name in self.at if not self.by[name]]}")
            plan = Plan.of(self.seed * 1000 + self.runs)
            root = self.directory / f"run_{self.runs}"
            try:
                self._one_run(plan, root)
            except Found as caught:
                raise Found(f"{plan}\n{root}\n{caught}") from None
            shutil.rmtree(root)
            shutil.rmtree(root.with_suffix(".clean"))
            self.runs += 1

    def _one_run(self, plan: Plan, root: Path) -> None:
        clean = root.with_suffix(".clean")
        reached = self._clean(plan, clean)
        root.mkdir(parents=True)
        memories = {name: Memory() for name in NAMES}
        kills, spoilt = 0, False
        while True:
            arm = self._armed(reached) if kills < KILLS_PER_RUN else {}
            if not self._one_life(plan, root, memories, arm, reached):
                kills += 1
            else:
                break
            for memory in memories.values():
                if self.rng.random() < 0.5:
                    memory.save({})
            if not spoilt and plan.keep_commits > 1 and self.rng.random() < 0.1:
                spoilt = self._spoil(root, memories)
        error = root / "error"
        crashes = len((root / "crashes").read_text().splitlines()) if (root / "crashes").exists() else 0
        pid = child(lambda: torture_check.hold(plan, root, clean, lost=kills + crashes), error)
        if not ended(pid, error):
            raise Found("the check was killed")
        self.crashes += crashes
        self.spoilt += spoilt
        made = [line.split()[0] for line in (root / "made").read_text().splitlines()]
        self.redone += len(made) - len(set(made))

    def _clean(self, plan: Plan, root: Path) -> dict[str, int]:
        """The run without faults. Returns how often it reaches each failpoint."""
        root.mkdir(parents=True)
        trigger = Trigger({})

        def life() -> None:
            failpoint.arm(trigger)
            began = time.monotonic()
            asyncio.run(Life(plan, root, 0, {name: Memory() for name in NAMES}).run())
            seen = {**trigger.seen, "ms": int(1000 * (time.monotonic() - began))}
            (root / "reached").write_text(json.dumps(seen))
            torture_check.hold(plan, root, root, lost=0)

        error = root / "error"
        ended(child(life, error), error)
        return dict(json.loads((root / "reached").read_text()))

    def _armed(self, reached: dict[str, int]) -> dict[str, Any]:
        """One kill, at the failpoint that had the fewest, or after some time; sometimes a crash before it."""
        armed: dict[str, Any] = {}
        if self.rng.random() < 0.25:
            armed["time"] = self.rng.random() * reached["ms"] / 3000
        else:
            known = [name for name in self.at if reached.get(name)]
            name = min(known, key=lambda each: (self.by[each] // 2, self.rng.random()))
            armed[name] = (self.rng.randint(1, max(1, reached[name] // 4)), kill_self)
        if self.rng.random() < 0.4:
            name = self.rng.choice(SOFT)
            armed.setdefault(name, (self.rng.randint(1, max(1, reached.get(name, 1) // 4)), crash))
        return armed

    def _one_life(
        self, plan: Plan, root: Path, memories: dict[str, Memory], armed: dict[str, Any], reached: dict[str, int]
    ) -> bool:
        """True where the run came to its end."""
        wanted = {name: what for name, what in armed.items() if name != "time"}
        seed = self.rng.getrandbits(32)

        def life() -> None:
            torture_plants.plant(self.plant)
            failpoint.arm(Trigger(wanted))
            asyncio.run(Life(plan, root, seed, memories).run())

        error = root / "error"
        pid = child(life, error)
        if "time" in armed:
            time.sleep(armed["time"])
            os.kill(pid, signal.SIGKILL)
        over = ended(pid, error)
        if not over:
            self.by["some time" if "time" in armed else next(n for n, w in wanted.items() if w[1] is kill_self)] += 1
        return over

    def _spoil(self, root: Path, memories: dict[str, Memory]) -> bool:
        """Damage the newest checkpoint: the learner must fall back to the one before."""
        found = [path for path in (root / "checkpoints").glob("step_*") if path.suffix != ".partial"]
        if len(found) < 2:
            return False
        newest = max(found, key=lambda path: int(path.name.split("_")[1].partition(".")[0]))
        (newest / "state.json").write_text("spoilt")
        memories["learner"].save({})
        return True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", default="", choices=["", *torture_plants.PLANTS])
    parser.add_argument("--at", nargs="*", default=FAILPOINTS, choices=FAILPOINTS)
    options = parser.parse_args()
    heavy = sorted({"torch", "ray", "vllm", "transformers"} & set(sys.modules))
    assert not heavy, f"the parent has {heavy} imported: its forks are slow, and their threads are gone"
    gc.freeze()
    sizes = {"kills": options.kills, "seed": options.seed, "plant": options.plant, "at": options.at}
    torture = Torture(options.directory, **sizes)
    began, found = time.monotonic(), ""
    try:
        torture.run()
    except Found as caught:
        found = str(caught)
        print(found)
    facts = {"kills": torture.total, "by": dict(torture.by), "runs": torture.runs, "redone": torture.redone}
    facts |= {"crashes": torture.crashes, "spoilt": torture.spoilt, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps({**facts, "seed": options.seed, "found": found[-600:]}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
