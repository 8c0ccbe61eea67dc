"""A directory as the pages speak of it: a model, data, a run.toml; and a run that was made there."""

import shutil
from pathlib import Path

import pytest

from millrace.cluster import config, jobs

# Small and quick: a table policy that answers with some digit learns to answer with the right one.
RUN = """\
model = "model"
recipe = "grpo"
data = { train = "train.jsonl", held_out = "held_out.jsonl" }
loop = { steps = 6, groups_per_step = 16, group_size = 8, max_lag = 1 }
sampling.max_tokens = 4
rewards = { verifier = "exact", poll_s = 0.1, heartbeat_s = 0.1 }
generation = { engine = "table", slots = 64, heartbeat_s = 0.1, linger_s = 0.02 }
learner = { learning_rate = 0.5, threads = 1 }
evaluation.every = 3
"""


@pytest.fixture(scope="session")
def workplace(digit_model: Path, copy_task: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, train.jsonl, held_out.jsonl, run.toml, and what running it left: runs/run."""
    root = tmp_path_factory.mktemp("workplace")
    shutil.copytree(digit_model, root / "model")
    for name, path in copy_task.items():
        shutil.copy(path, root / f"{name}.jsonl")
    (root / "run.toml").write_text(RUN)
    jobs.train(config.load(root / "run.toml"), local=True, say=lambda line: None)
    return root
