"""What benchmarks/serial_ceiling.py asks of the raw parts, and what they answer. Imports no engine."""

from dataclasses import dataclass
from typing import Literal

Part = Literal["generate", "generate with transformers", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One measurement."""

    part: Part
    threads: int  # of torch
    steps: int  # whose rollouts are generated, or trained
    groups: int  # of a step
    group_size: int
    max_tokens: int
    at_once: bool = False  # all steps' rollouts in one call of `generate`, instead of a call for each step


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What it came to."""

    samples_per_s: float
    tokens_per_sample: float
