"""The run that is counted and weighed: the demo's sorting task, on a policy that knows nothing yet."""

from typing import Any

from benchmarks.harness import ROOT

DATA = ROOT / "examples" / "sorting"


def sorting_run(*, steps: int, groups_per_step: int) -> dict[str, Any]:
    """A run's configuration as in its TOML file; the model is expected beside it, as `model`."""
    return {
        "model": "model",
        "recipe": "grpo",
        "data": {"train": str(DATA / "train.jsonl"), "held_out": str(DATA / "held_out.jsonl")},
        "rewards": {"verifier": "position_match"},  # also a policy that knows nothing gets some of it
        "loop": {"steps": steps, "groups_per_step": groups_per_step, "group_size": 8, "max_lag": 2},
        "sampling": {"max_tokens": 16},
        "learner": {"learning_rate": 1e-4},
        "evaluation": {"every": max(1, steps // 4)},
    }
