"""Generation worker against raw vLLM: tokens per second on the same prompts.

Two processes hold an engine each, and only one works at a time, in turn. Raw vLLM runs twice per round: with one seed
per request, and without; the figure is against the faster of the two, although ours reproduces every response.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.generation_arms import serve
from benchmarks.generation_work import Done, Setting, Work
from examples import tiny_model

DEADLINE_S = 170.0
DATA = harness.ROOT / "examples" / "sorting" / "train.jsonl"


@contextmanager
def processes(setting: Setting) -> Iterator[Mapping[str, Connection]]:
    """Both arms, started one after the other; they end with the block."""
    context = multiprocessing.get_context("spawn")
    started: dict[str, Any] = {}
    connections: dict[str, Connection] = {}
    try:
        for arm in ("ours", "raw"):
            connections[arm], theirs = context.Pipe()
            started[arm] = context.Process(target=serve, args=(theirs, arm, setting), daemon=True)
            started[arm].start()
            theirs.close()
            print(f"  {_answer(connections[arm])}")
        yield connections
    finally:
        for arm, process in started.items():
            with suppress(BrokenPipeError):  # it has failed
                connections[arm].send(None)
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _answer(connection: Connection) -> Any:
    if not connection.poll(DEADLINE_S):
        raise TimeoutError(f"an arm did not answer within {DEADLINE_S:g} s")
    return connection.recv()


def compare(
    connections: Mapping[str, Connection], work: Work, *, pairs: int, warm: int
) -> tuple[harness.Ratio, dict[str, object]]:
    """Ratio ours / the faster raw of the tokens per second, and what else was seen."""
    last: dict[str, Done] = {}
    per_cpu_s: dict[str, list[float]] = {"ours": [], "raw": [], "raw seeded": []}

    def arm(name: str, process: str, its: Work) -> float:
        connections[process].send(its)
        done: Done = _answer(connections[process])
        last[name] = done
        per_cpu_s[name].append(done.tokens / done.cpu_s)
        return done.tokens / done.seconds

    plain, seeded = replace(work, seeded=False), replace(work, seeded=True)
    found = harness.interleave(
        {
            "ours": lambda: arm("ours", "ours", plain),
            "raw": lambda: arm("raw", "raw", plain),
            "raw seeded": lambda: arm("raw seeded", "raw", seeded),
        },
        pairs=pairs,
        warm=warm,
    )
    faster = max(("raw", "raw seeded"), key=lambda name: float(np.median(found[name])))
    details: dict[str, object] = {
        "pairs": pairs,
        "tokens_per_burst": {name: done.tokens for name, done in last.items()},
        "tokens_per_s": {name: round(float(np.median(values))) for name, values in found.items()},
        "faster_raw": faster,
        "per_cpu_s_over_faster_raw": str(harness.ratio(per_cpu_s["ours"][warm:], per_cpu_s[faster][warm:])),
        "over_raw_seeded": str(harness.ratio(found["ours"], found["raw seeded"])),
        "over_raw_unseeded": str(harness.ratio(found["ours"], found["raw"])),
        "ours": last["ours"].details,
        "limit": 1.0,
    }
    return harness.ratio(found["ours"], found[faster]), details


def main() -> None:
    """Measure equal lengths, lengths that differ, and lengths that differ while weights change."""
    parser = harness.arguments(__doc__)
    parser.set_defaults(pairs=7)
    parser.add_argument("--groups", type=int, default=128, help="of a burst (default 128)")
    parser.add_argument("--slots", type=int, default=64, help="concurrent sequences (default 64)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a response (default 64)")
    parser.add_argument("--only", choices=("equal", "stops", "updates"), nargs="*", help="of the three rows")
    parser.add_argument("--one-core", action="store_true", help="pin each arm's process to a single core")
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    every = sorted(os.sched_getaffinity(0))
    cores = tuple(every[-1:]) if given.one_core else tuple(every)
    base = Work(groups=given.groups, group_size=8, max_tokens=given.max_tokens, stops=False)
    works = {
        "equal": ("equal lengths", base),
        "stops": ("lengths by a stop token", replace(base, stops=True)),
        "updates": ("lengths by a stop token, new weights every step", replace(base, stops=True, publish_every=1)),
    }
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        tiny_model.build(model)
        setting = Setting(
            model=str(model),
            data=str(DATA),
            directory=directory,
            slots=given.slots,
            max_model_len=given.max_tokens + 32,
            cores=cores,
        )
        with processes(setting) as connections:
            for name, (lengths, work) in works.items():
                if given.only and name not in given.only:
                    continue
                warm = 1 if rows else 2
                found, details = compare(connections, work, pairs=given.pairs, warm=warm)
                details["cores"] = len(cores)
                target: harness.Target | None = None if work.publish_every else (">=", 0.95)
                id = f"P6/{name}" + ("-one-core" if given.one_core else "")
                what = f"generation worker / raw vLLM, tokens/s, {lengths}"
                rows.append(harness.row(id, what, found, target=target, where=where, details=details))
                print(f"  {name}: {found} {details}")
    if not given.no_record:
        harness.record(rows)


if __name__ == "__main__":
    main()
