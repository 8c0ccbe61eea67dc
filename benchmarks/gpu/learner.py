"""What one GPU shows of the learner, without Ray and vLLM: tokens/s and MFU, memory of the head, and correctness.

    python -m benchmarks.gpu.learner --out DIRECTORY

Randomly initialised models of Qwen3's shapes make the learner's own steps (assembly, packed attention, chunked
log-probabilities, fused AdamW on float32 masters, products in bfloat16) on one packed row. MFU is the operations of
work.py over the seconds of a whole step and the datasheet's dense bfloat16 peak; beside it stands the same over a
matrix product of 8192 measured between the steps. It ends within --minutes: a row that finds no time says so.
"""

import os

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import argparse
import json
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import harness
from benchmarks.gpu import attention, head
from benchmarks.gpu.accelerator import Accelerator
from benchmarks.gpu.shapes import REAL, TINY, Shapes
from benchmarks.gpu.work import ROLLOUTS, Work, answers, judged, qwen3
from millrace.core.errors import MillraceError, TrainingError, boundary
from millrace.core.recipe import load
from millrace.learner.assemble import Assembled, assemble
from millrace.learner.attention import NAME
from millrace.learner.config import OptimiserConfig
from millrace.learner.loading import checkpoint_blocks, compile_blocks
from millrace.learner.model import Policy, prove_packing
from millrace.learner.objective import Objective
from millrace.learner.optimiser import Optimiser
from millrace.learner.step import make_step

STEPS, CELL_S = 5, 25.0  # of a cell: steps that are timed, and when no further one begins
NO_GPU = "not measured: no GPU"
FILE = "gpu_learner.json"


@dataclass(slots=True)
class Sheet:
    """The rows, written after each; those that were measured before stay where this run measures nothing."""

    path: Path
    shapes: Shapes
    where: str
    facts: Mapping[str, str]

    def add(
        self, id: str, value: float | None, details: Mapping[str, object], *, extent: tuple[float, float] | None = None
    ) -> None:
        """Put one in. Without a value its details say `why`."""
        what, target = self.shapes.planned()[id]
        known = {row["id"]: row for row in (json.loads(self.path.read_text()) if self.path.exists() else ())}
        if value is None and known.get(f"P20/{id}", {}).get("value") is not None:
            print(f"P20/{id}: {details['why']}; the row that was measured before stays")
            return
        details = {**self.facts, **details}
        row = harness.row(f"P20/{id}", what, value or 0.0, target=target, where=self.where, details=details)
        made = asdict(replace(row, interval=extent, command="python -m benchmarks.gpu.learner"))
        if value is None:
            made |= {"value": None, "reached": None}
        known[row.id] = made
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(list(known.values()), indent=1) + "\n")
        verdict = {True: "reached", False: "MISSED", None: ""}[made["reached"]]
        shown = details["why"] if value is None else f"{value:.4g} {row.target} {verdict}"
        print(f"P20/{id}: {shown}  {what}".rstrip(), flush=True)

    @contextmanager
    def row(self, *ids: str) -> Iterator[None]:
        """What fails within says so in these rows, and the others are measured all the same."""
        try:
            with boundary(ids[0], TrainingError):
                yield
        except MillraceError as caught:
            traceback.print_exc()
            for id in ids:
                self.add(id, None, {"why": f"not measured: {str(caught).splitlines()[0][:200]}"})


class Stepper:
    """The learner's step on one model."""

    def __init__(self, name: str, accelerator: Accelerator, *, compiled: bool, rows: int) -> None:
        self.config = qwen3(name, rows=rows)
        torch.manual_seed(0)
        with accelerator.device:
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.float32, attn_implementation=NAME
            ).eval()
        prove_packing(self.model)
        if compiled:
            compile_blocks(self.model)
        self.policy = Policy(self.model, compute_dtype=torch.bfloat16, compiled=compiled)
        self.objective = Objective.of(load("grpo", root=Path.cwd()).objective)
        self.optimiser = Optimiser(self.model.named_parameters(), OptimiserConfig(learning_rate=1e-6))

    def batch(self, kind: str, rows: int) -> Assembled:
        """One packed row."""
        rng = np.random.default_rng(0)
        groups = judged(answers(kind, rows, rng), self.config.vocab_size, rng)
        return assemble(groups, self.objective, token_budget=rows)

    def work(self, made: Assembled) -> Work:
        """Of a step on it."""
        ((micro,),) = made.updates
        return Work.of(self.config, rows=made.rows, loss_tokens=len(micro.token_N), pairs=micro.plan.runs.pairs)

    def checkpointed(self, on: bool) -> None:
        """Whether blocks compute their activations again."""
        if on:
            checkpoint_blocks(self.model)
        else:
            self.model.gradient_checkpointing_disable()

    def step(self, kind: str, rows: int) -> float:
        """Assemble and learn, from and to numbers on the host."""
        made = self.batch(kind, rows)
        return make_step(self.policy, self.objective, self.optimiser, made.updates[0], name=str).loss

    def unequal(self, kind: str, rows: int) -> int:
        """Of how many parameters the gradients of two passes over the same batch differ in any bit."""
        ((micro,),) = self.batch(kind, rows).updates
        passes = []
        for _ in range(2):
            self.objective(self.policy.words(micro, self.objective.needs)).value.backward()
            passes.append([p.grad for p in self.optimiser.parameters])
            self.optimiser.clear()
        first, second = passes
        return sum(x is None or y is None or not torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def forget(self) -> None:
        """What an interrupted step left."""
        self.optimiser.clear()
        self.model.zero_grad(set_to_none=True)


def cell(stepper: Stepper, accelerator: Accelerator, kind: str, rows: int, *, size: int) -> dict[str, Any]:
    """Seconds of steps on a row, and what else was seen. Without checkpointing where there is room.

    Args:
        size: of the matrix product that is timed between steps.
    """
    work = stepper.work(stepper.batch(kind, rows))
    for again in (False, True):
        stepper.checkpointed(again)
        held = accelerator.held_bytes()
        began = time.monotonic()
        try:
            peak = accelerator.peak_bytes(lambda: stepper.step(kind, rows))
            stepper.step(kind, rows)
            break
        except torch.OutOfMemoryError:
            stepper.forget()
        accelerator.clear()
    else:
        return {"why": "not measured: out of memory even with gradient checkpointing"}
    warming_s = time.monotonic() - began
    seconds, gemm = [], []
    began = time.monotonic()
    while len(seconds) < STEPS and (len(seconds) < 2 or time.monotonic() - began < CELL_S):
        gemm.append(accelerator.gemm(size=size, repeats=5))
        seconds.append(accelerator.seconds(lambda: stepper.step(kind, rows)))
    assembly_s = accelerator.seconds(lambda: stepper.batch(kind, rows))
    return {
        "work": work,
        "seconds": seconds,
        "gemm": float(np.median(gemm)),
        "details": {
            "rows": work.rows,
            "loss_tokens": work.loss_tokens,
            "gradient_checkpointing": again,
            "two_steps_before_s": warming_s,
            "assembly_s": assembly_s,
            "peak_gib": None if peak is None else (held + peak) / 2**30,
        },
    }


def of_cell(found: Mapping[str, Any], peak: float | None) -> tuple[float, tuple[float, float], dict[str, object]]:
    """MFU, its range over the steps, and what belongs beside it.

    Args:
        peak: the datasheet's operations per second; None: the measured product's.
    """
    work, seconds = found["work"], np.asarray(found["seconds"])
    middle = float(np.median(seconds))
    of = peak or found["gemm"]
    mfu = work.operations / middle / of
    extent = work.operations / float(seconds.max()) / of, work.operations / float(seconds.min()) / of
    return (
        mfu,
        extent,
        {
            "tokens_per_s": work.rows / middle,
            "step_s": middle,
            "interval_is": f"range of {len(seconds)} steps",
            "peak_operations_per_s": of,
            "measured_gemm_operations_per_s": found["gemm"],
            "share_of_measured_gemm": work.operations / middle / found["gemm"],
            "mfu_of_6_n_t_alone": 6 * (work.weights + work.head_weights) * work.rows / middle / of,
            "mfu_with_whole_squares": (work.matrices + 12 * work.rows**2 * work.heads * work.width * work.layers)
            / middle
            / of,
            "formula": "6 x (block weights x rows + head weights x loss tokens) + 12 x seen pairs x heads x width"
            " x layers, over step seconds and peak",
            **found["details"],
        },
    )


def learner_rows(
    sheet: Sheet, accelerator: Accelerator, name: str, *, compiled: bool, profiled: bool, ends_s: float
) -> None:
    """Tokens/s and MFU of a model's cells, and a profile of the first."""
    cells = {f"mfu-{name}-{rows}-{kind}": (rows, kind) for rows, kind in sheet.shapes.cells}
    stepper = None
    with sheet.row(*cells, f"repeat-{name}"):
        stepper = Stepper(name, accelerator, compiled=compiled, rows=max(rows for rows, _ in cells.values()))
    if stepper is None:
        return
    repeat = f"repeat-{name}"
    with sheet.row(repeat):
        rows, kind = min(cells.values())
        stepper.checkpointed(True)
        sheet.add(repeat, stepper.unequal(kind, rows), {"rows": rows, "of": len(stepper.optimiser.parameters)})
    for place, (id, (rows, kind)) in enumerate(cells.items()):
        if time.monotonic() > ends_s:
            sheet.add(id, None, {"why": "not measured: out of time"})
            continue
        with sheet.row(id):
            found = cell(stepper, accelerator, kind, rows, size=sheet.shapes.gemm)
            if "why" in found:
                sheet.add(id, None, found)
                continue
            mfu, extent, details = of_cell(found, accelerator.datasheet)
            graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
            sheet.add(id, mfu, {**details, "compiled": compiled, "compiled_graphs": graphs}, extent=extent)
            if place == 0 and profiled:
                profile_of(stepper, accelerator, kind, rows, sheet.path.parent / f"gpu_profile_{name}.txt")


def profile_of(stepper: Stepper, accelerator: Accelerator, kind: str, rows: int, path: Path) -> None:
    """Where the time of one step goes, by kernel."""
    on_gpu = accelerator.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=kinds) as seen:
        stepper.step(kind, rows)
        accelerator.synchronize()
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    path.write_text(seen.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=70))


def head_rows(sheet: Sheet, accelerator: Accelerator) -> None:
    """Memory and time of the head's paths, and their errors."""
    shapes = sheet.shapes
    size = {"hidden": shapes.hidden, "vocabulary": shapes.vocabulary}
    for tokens in shapes.head_tokens:
        with sheet.row(f"head-memory-{tokens}"):
            parts = {}
            for name, path in (("chunked", head.chunked), ("fused", head.fused), ("full", head.full)):
                parts[name] = head.costs(accelerator, path, tokens=tokens, **size)
                accelerator.clear()
            ours, theirs = (parts[name].get("peak_bytes") for name in ("fused", "full"))
            if isinstance(ours, int) and isinstance(theirs, int):
                sheet.add(f"head-memory-{tokens}", ours / theirs, parts)
            else:
                sheet.add(f"head-memory-{tokens}", None, {"why": parts["full"].get("why", NO_GPU), **parts})
    with sheet.row("head-error"):
        errors = head.correctness(accelerator, tokens=shapes.error_tokens, **size)
        sheet.add("head-error", errors["fused"]["logprob_nats"], errors)
    accelerator.clear()


def attention_rows(sheet: Sheet, accelerator: Accelerator) -> None:
    """Errors and speed of one layer's packed attention."""
    query, key, width = sheet.shapes.heads
    shape = {"query": query, "key": key, "width": width}
    with sheet.row("attention-error"):
        plan = attention.row_of(ROLLOUTS, sheet.shapes.error_rows, accelerator.device)
        errors = {
            str(dtype).removeprefix("torch."): attention.correctness(plan, **shape, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }
        sheet.add("attention-error", max(errors["bfloat16"].values()), errors)
    peak = accelerator.datasheet or accelerator.gemm(size=sheet.shapes.gemm)
    for rows, kind in dict.fromkeys((max(sheet.shapes.cells)[0], kind) for _, kind in sheet.shapes.cells):
        accelerator.clear()
        with sheet.row(f"attention-{rows}-{kind}"):
            seen = attention.speed(accelerator, attention.row_of(kind, rows, accelerator.device), **shape)
            share = seen["forward_and_backward_operations_per_s"] / peak
            sheet.add(f"attention-{rows}-{kind}", share, seen)
    accelerator.clear()


def main() -> None:
    """Measure what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the rows and the profiles")
    parser.add_argument("--only", nargs="+", choices=("attention", "head", *REAL.models), help="parts; default: all")
    parser.add_argument("--minutes", type=float, default=6.5, help="after which no further step of a model is tried")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave blocks and head uncompiled")
    parser.add_argument("--no-profile", dest="profile", action="store_false", help="write no gpu_profile_*.txt")
    parser.add_argument("--tiny", action="store_true", help="every path once with tiny shapes, on a CPU if need be")
    given = parser.parse_args()
    ends_s = time.monotonic() + 60 * given.minutes
    shapes = TINY if given.tiny else REAL
    accelerator = Accelerator.here() or (Accelerator(torch.device("cpu")) if given.tiny else None)
    where = f"{accelerator.name if accelerator else 'no GPU'}; {harness.machine()}"
    sheet = Sheet(given.out / FILE, shapes, where, accelerator.facts() if accelerator else {})
    if accelerator is None:
        for id in shapes.planned():
            sheet.add(id, None, {"why": NO_GPU})
        return
    parts = given.only or ("attention", "head", *shapes.models)
    if "attention" in parts:
        attention_rows(sheet, accelerator)
    if "head" in parts:
        head_rows(sheet, accelerator)
    for name in shapes.models:
        if name in parts:
            learner_rows(sheet, accelerator, name, compiled=given.compile, profiled=given.profile, ends_s=ends_s)
            accelerator.clear()


if __name__ == "__main__":
    main()
