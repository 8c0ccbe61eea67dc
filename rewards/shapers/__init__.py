"""Shapers: words of one judged group -> reward_G. Numpy; applied in order, before filters and baselines.

A shaper is a function of words, filled in by name: core/words.py, GROUP and JUDGED. Its keyword-only parameters are
what a recipe may set. Those with memory are dataclasses; see core/catalogue.py.
"""

from millrace.rewards.shapers.components import affine, clip, gate, weighted
from millrace.rewards.shapers.divergence import kl
from millrace.rewards.shapers.format import matches, repetition
from millrace.rewards.shapers.length import (
    cosine,
    efficient,
    kimi_length,
    lead,
    length_budget,
    length_cost,
    length_target,
    overlong,
    truncation_penalty,
    truncation_value,
)
from millrace.rewards.shapers.normalisation import moving_baseline, running_scale
from millrace.rewards.shapers.schedules import scheduled

__all__ = [
    "affine",
    "clip",
    "cosine",
    "efficient",
    "gate",
    "kimi_length",
    "kl",
    "lead",
    "length_budget",
    "length_cost",
    "length_target",
    "matches",
    "moving_baseline",
    "overlong",
    "repetition",
    "running_scale",
    "scheduled",
    "truncation_penalty",
    "truncation_value",
    "weighted",
]
