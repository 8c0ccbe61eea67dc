"""A process that starts imports what it works with and no more: a run waits for the slowest of them."""

import subprocess
import sys

import pytest

TORCH = ("torch", "transformers.modeling_utils", "vllm", "peft")
MODELS = TORCH[1:]  # with torch's compiler, seconds more than torch


@pytest.mark.parametrize(
    ("module", "without"),
    [
        pytest.param("millrace.cluster.jobs", MODELS, id="driver"),
        pytest.param("millrace.cluster.process", (*TORCH, "transformers"), id="any component"),
        pytest.param("millrace.core.replay.queue", (*TORCH, "transformers", "ray"), id="queue"),
        pytest.param("millrace.core.weight_store", (*TORCH, "transformers", "ray"), id="weight store"),
        pytest.param("millrace.actors.generation", (*TORCH, "transformers", "ray"), id="generation worker"),
        pytest.param("millrace.rewards.worker", (*TORCH, "transformers", "ray"), id="reward worker"),
        pytest.param("millrace.cluster.held_out", (*TORCH, "transformers", "ray"), id="held-out evaluation"),
        pytest.param("millrace.learner.learner", ("vllm", "ray"), id="learner"),
    ],
)
def test_what_it_does_not_need_is_not_imported(module: str, without: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {without} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("place", ["millrace.cluster.wiring:LEARNER", "millrace.cluster.supervised:LEARNER"])
def test_a_component_named_by_its_place_is_there(place: str) -> None:
    code = (
        "from importlib import import_module; from millrace.cluster.process import found\n"
        f"module, name = {place!r}.split(':'); print(found(getattr(import_module(module), name)).__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() in ("Learner", "SupervisedLearner")
