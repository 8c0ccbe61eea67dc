"""One optimiser step on a batch of random rollouts, the first of its process: `python -m ... MODEL GROUPS`."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from pathlib import Path

import numpy as np

from benchmarks import learner_step
from millrace.core.recipe import load
from millrace.learner.objective import Objective

if __name__ == "__main__":
    learner_step.GROUPS[learner_step.SHORT] = int(sys.argv[2])
    ours = learner_step.Ours(sys.argv[1], Objective.of(load("grpo", root=Path.cwd()).objective))
    data = learner_step.batch(learner_step.SHORT, np.random.default_rng(0), int(ours.model.config.vocab_size))
    print("ready", flush=True)
    ours.step(data)
    print("stepped", flush=True)
