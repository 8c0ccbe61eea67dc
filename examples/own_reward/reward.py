"""A reward of one's own: `rewards.verifier = "reward.py:score"` in run.toml, and nothing else anywhere.

A reward asks for words by name: `text` (the response), `answer`, `prompt`, `tokens_T`, `finish_reason`, `row`, or any
further column of the data. It returns a number, or named components among which `score` is the reward; what it raises
is never a score. One that calls a service is written `async def score(...)` and may await; nothing else changes.
"""

import re

STATED = re.compile(r"\[(\d)\]")


def score(text: str, answer: str) -> dict[str, float]:
    """1 for the right digit, wherever it stands; and, as a component, whether it stands in brackets as asked for.

    Held-out evaluation reports the score. What training makes of the components is said by the shapers in run.toml.

    >>> score("[8]", "8"), score("8", "8"), score("[3]", "8")
    ({'score': 1.0, 'format': 1.0}, {'score': 1.0, 'format': 0.0}, {'score': 0.0, 'format': 1.0})
    """
    stated = STATED.fullmatch(text.strip())
    digits = re.findall(r"\d", text)
    return {"score": float(digits == [answer]), "format": float(stated is not None)}
