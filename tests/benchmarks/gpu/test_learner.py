"""What a GPU's rows say where one fails, where none can be measured, and of what their numbers are made."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import table
from benchmarks.gpu import attention, head, learner
from benchmarks.gpu.accelerator import Accelerator
from benchmarks.gpu.work import ROLLOUTS, Work

CPU = Accelerator(torch.device("cpu"))


def sheet_of(path: Path) -> learner.Sheet:
    return learner.Sheet(path / learner.FILE, learner.REAL, "here", {"gpu": "none"})


def rows_of(path: Path) -> dict[str, dict[str, object]]:
    return {row["id"]: row for row in json.loads((path / learner.FILE).read_text())}


def test_without_a_gpu_every_row_says_so_and_measured_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["learner", "--out", str(tmp_path)])
    sheet_of(tmp_path).add("head-error", 1e-5, {})
    learner.main()
    found = rows_of(tmp_path)
    assert set(found) == {f"P20/{id}" for id in learner.REAL.planned()}
    assert found["P20/head-error"]["value"] == 1e-5 and found["P20/head-error"]["reached"]
    row = found["P20/mfu-0.6B-65536-rollouts"]
    assert (row["value"], row["reached"], row["target"]) == (None, None, ">= 0.2948")
    assert row["details"]["why"] == learner.NO_GPU
    assert f"| none | {learner.NO_GPU} | >= 0.2948 |" in table.table([row])


def test_what_fails_says_why_and_the_rest_goes_on(tmp_path):
    sheet = sheet_of(tmp_path)
    with sheet.row("head-error", "attention-error"):
        raise RuntimeError("no kernel image")
    sheet.add("head-memory-65536", 0.25, {})
    found = rows_of(tmp_path)
    why = "not measured: head-error raised RuntimeError: no kernel image"
    assert [found[f"P20/{id}"]["details"]["why"] for id in ("head-error", "attention-error")] == [why, why]
    assert found["P20/head-memory-65536"]["value"] == 0.25


def test_mfu_is_operations_over_seconds_and_peak():
    work = Work(weights=10, head_weights=4, rows=3, loss_tokens=2, pairs=5, heads=2, width=8, layers=7)
    found = {"work": work, "seconds": [2.0, 1.0, 4.0], "gemm": 2000.0, "details": {}}
    mfu, extent, details = learner.of_cell(found, 4000.0)
    assert mfu == work.operations / 2.0 / 4000.0
    assert extent == (mfu / 2, mfu * 2)
    assert details["tokens_per_s"] == 1.5 and details["share_of_measured_gemm"] == pytest.approx(2 * mfu)
    assert learner.of_cell(found, None)[0] == pytest.approx(2 * mfu)


def test_the_heads_paths_are_close_to_float64_and_a_wrong_one_is_not():
    found = head.correctness(CPU, tokens=24, hidden=16, vocabulary=64)
    assert all(error < 0.1 for path in ("chunked", "full") for error in found[path].values())
    problem = head.Problem.of(24, 16, 64, CPU.device)
    exact = problem.exact().step(head.float64)
    plain = head.errors(lambda of: head.float64(of), problem, exact)
    assert max(plain.values()) < 1e-4

    def planted(of: head.Problem) -> head.Scored:
        logprob_N, entropy_N = head.float64(of)
        return logprob_N, entropy_N * 1.01

    wrong = head.errors(planted, problem, exact)
    assert wrong["entropy_nats"] > 1e-3 and wrong["hidden_gradient"] > 1e-5


def test_packed_attention_is_close_to_float64():
    plan = attention.row_of(ROLLOUTS, 256, CPU.device)
    shape = {"query": 2, "key": 1, "width": 16}
    assert max(attention.correctness(plan, **shape, dtype=torch.float32).values()) < 1e-5
    rounded = attention.correctness(plan, **shape, dtype=torch.bfloat16)
    assert min(rounded.values()) > 1e-4 and max(rounded.values()) < 0.02


def test_a_cell_makes_steps_of_the_learner_with_and_without_checkpointing():
    stepper = learner.Stepper("tiny", CPU, compiled=False, rows=256)
    before = [p.detach().clone() for p in stepper.optimiser.parameters]
    assert stepper.unequal(ROLLOUTS, 256) == 0
    assert all(torch.equal(x, y) for x, y in zip(before, stepper.optimiser.parameters, strict=True))
    stepper.checkpointed(True)
    recomputed = stepper.step(ROLLOUTS, 256)
    found = learner.cell(stepper, CPU, ROLLOUTS, 256, size=32)
    assert len(found["seconds"]) >= 2 and min(found["seconds"]) > 0 and found["work"].rows == 256
    assert found["details"]["gradient_checkpointing"] is False
    assert recomputed == pytest.approx(stepper.step(ROLLOUTS, 256), abs=1e-2)
    assert stepper.optimiser.steps >= 4
