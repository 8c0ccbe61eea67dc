"""Verifiers: what a response is worth, from 0 to 1.

A verifier is a function of words, filled in by name: `text` (the response), `answer`, `prompt` (its text), `tokens_T`,
`finish_reason`, `row`, or the name of a further column of the data. Its keyword-only parameters are what a recipe may
set. It returns a number in [0, 1], a mapping of named parts with `score`, or a Verdict where the cause matters.
"""

from millrace.rewards.verifiers.games import countdown
from millrace.rewards.verifiers.isolation import isolated
from millrace.rewards.verifiers.letters import choice
from millrace.rewards.verifiers.mathematics import math
from millrace.rewards.verifiers.numbers import numeric
from millrace.rewards.verifiers.patterns import regex
from millrace.rewards.verifiers.text import exact, position_match

__all__ = ["choice", "countdown", "exact", "isolated", "math", "numeric", "position_match", "regex"]
