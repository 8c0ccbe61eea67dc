"""rollouts.jsonl: sampled rollouts of a run with the text of every token, one a line, bounded in size."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from millrace.cluster.lines import FULL
from millrace.cluster.record import plain
from millrace.cluster.run_directory import ROLLOUTS
from millrace.core.types import Ints
from millrace.learner.samples import SampledRollout

MAX_BYTES = 16 * 2**20  # of the file: a report holds all of it, and a browser opens that at once
PARTIAL = "\ufffd"  # what decoders make of the first bytes of a character; some make one of each, of at most three


class RolloutLog:
    """Writes rollouts.jsonl of one run directory.

    When the file passes `max_bytes`, only every second step stays in it, then every fourth, and so on, of what is
    there and of what comes: the run is covered from its beginning to its end however long it is.
    """

    def __init__(
        self, directory: Path, tokenizer: Callable[[], PreTrainedTokenizerBase], *, max_bytes: int = MAX_BYTES
    ) -> None:
        self.path = directory / ROLLOUTS
        self._load = tokenizer  # called once, with the first samples
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._max_bytes = max_bytes
        self._stride = 1
        self._waiting = b""  # for room on the disk

    def write(self, samples: Sequence[SampledRollout]) -> None:
        """Append the samples of steps that are kept; on its way to the disk when the call returns."""
        kept = [each for each in samples if each.step % self._stride == 0]
        if not kept:
            return
        if self._tokenizer is None:
            self._tokenizer = self._load()
        self._waiting += b"".join(json.dumps(line(each, self._tokenizer)).encode() + b"\n" for each in kept)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(self._waiting)
        except OSError as caught:
            if caught.errno not in FULL:
                raise
            os.truncate(self.path, size)  # they go with the next ones
            return
        size += len(self._waiting)
        self._waiting = b""
        if size > self._max_bytes:
            self._thin()

    def rewind(self, step: int) -> None:
        """Forget the rollouts of steps beyond `step`, which will be made again, and a line that was cut off."""
        if self.path.exists():
            self._keep([each for each in self._lines() if _step(each) <= step])

    def _thin(self) -> None:
        """To half the size or less, so that it happens rarely."""
        lines = self._lines()
        steps = [_step(each) for each in lines]
        while sum(len(each) + 1 for each in lines) > self._max_bytes / 2:
            self._stride *= 2
            kept = [at for at, step in enumerate(steps) if step % self._stride == 0]
            lines, steps = [lines[at] for at in kept], [steps[at] for at in kept]
        self._keep(lines)

    def _lines(self) -> list[bytes]:
        whole, _, _torn = self.path.read_bytes().rpartition(b"\n")
        return whole.splitlines()

    def _keep(self, lines: Sequence[bytes]) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_bytes(b"".join(each + b"\n" for each in lines))
        partial.replace(self.path)


def _step(line: bytes) -> int:
    return int(json.loads(line)["step"])


def line(sample: SampledRollout, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A line of rollouts.jsonl.

    Returns:
        `tokens`, `logprobs` (nats) and `given`, the places among them that were not sampled, of the tokens that are
        kept: all `length` of the response, or all but those of `cut`, [start, end). `versions` are its runs [version,
        start, end), and `lags` the lag of each; `lag` is the greatest.
    """
    verdict = sample.verdict
    found: dict[str, Any] = plain(
        {
            "step": sample.step,
            "group": str(sample.group),
            "member": sample.member,
            "prompt_id": sample.prompt_id,
            "prompt": sample.prompt,
            "reward": _short(sample.reward),
            "advantage": None if sample.advantage is None else _short(sample.advantage),
            "lag": max(sample.lag, default=0),
            "finish_reason": sample.finish_reason,
            "length": sample.length,
            "cut": None if sample.cut is None else list(sample.cut),
            "tokens": texts(sample.tokens_T, tokenizer, cut=sample.cut[0] if sample.cut else None),
            "logprobs": [_short(each) for each in sample.behaviour_logprob_T.tolist()],
            "given": [place for place, sampled in enumerate(sample.sampled_T.tolist()) if not sampled],
            "versions": [list(run) for run in sample.versions],
            "lags": list(sample.lag),
            "verdict": {
                "kind": verdict.kind.value,
                "score": verdict.score,
                "components": dict(verdict.components),
                "feedback": verdict.feedback,
            },
        }
    )
    return found


def _short(number: float) -> float:
    """As many digits as float32 can tell apart where it matters."""
    return float(f"{number:.6g}")


def texts(tokens_T: Ints, tokenizer: PreTrainedTokenizerBase, *, cut: int | None = None) -> list[str]:
    """The text of each token; joined they are the text of all.

    A token that ends within a character has no text of its own, and the token that completes the character has all of
    it. What a token adds depends on those before it, such as a word's leading space; it is found by decoding each
    token together with the last ones that ended with a character.

    Args:
        cut: the place at which tokens are missing; what follows is decoded anew.
    """
    if cut is not None:
        return texts(tokens_T[:cut], tokenizer) + texts(tokens_T[cut:], tokenizer)
    ids = tokens_T.tolist()
    found: list[str] = []
    start = read = 0  # ids[start:read] are the context
    said = ""  # the text of the context and of what followed so far
    for end in range(1, len(ids) + 1):
        text = _decoded(ids[start:end], tokenizer)
        sure = text if end == len(ids) else text.removesuffix(PARTIAL).removesuffix(PARTIAL).removesuffix(PARTIAL)
        found.append(sure.removeprefix(said) if sure.startswith(said) else "")
        said += found[-1]
        if found[-1] and sure == text:
            start, read = read, end
            said = _decoded(ids[start:read], tokenizer)
    return found


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: Any = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
