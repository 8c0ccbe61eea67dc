"""The work of a GPU's cells: rows that are filled, operations that add up."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu.work import ROLLOUTS, SEQUENCE, Work, answers, judged, qwen3
from millrace.core.recipe import load
from millrace.learner.assemble import assemble
from millrace.learner.objective import Objective


@pytest.mark.parametrize("kind", [ROLLOUTS, SEQUENCE])
@pytest.mark.parametrize("rows", [256, 4096, 16_384])
@pytest.mark.parametrize("seed", range(3))
def test_answers_fill_one_packed_row_and_none_of_them_is_skipped(kind, rows, seed):
    rng = np.random.default_rng(seed)
    groups = judged(answers(kind, rows, rng), 100, rng)
    made = assemble(groups, Objective.of(load("grpo", root=Path.cwd()).objective), token_budget=rows)
    ((micro,),) = made.updates
    assert made.rows == len(micro.token_C) == rows and made.skipped_groups == 0
    assert micro.plan.runs.rows == rows
    assert len(micro.token_N) == made.tokens


@pytest.mark.parametrize("name", ["0.6B", "4B", "tiny"])
def test_weights_are_those_of_the_models_matrices(name):
    config = qwen3(name, rows=256)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    work = Work.of(config, rows=1, loss_tokens=1, pairs=1)
    assert work.weights + work.head_weights == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    if name != "tiny":
        assert sum(p.numel() for p in model.parameters()) == pytest.approx({"0.6B": 0.6e9, "4B": 4.0e9}[name], rel=0.02)


def test_operations_by_hand():
    work = Work(weights=10, head_weights=4, rows=3, loss_tokens=2, pairs=5, heads=2, width=8, layers=7)
    assert work.matrices == 6 * (10 * 3 + 4 * 2)
    assert work.attention == 12 * 5 * 2 * 8 * 7
    assert work.operations == work.matrices + work.attention
