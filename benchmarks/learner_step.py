"""Learner step against a plain padded torch step, on the same rollouts with the same loss.

Arm `ours`: rewards, packing with shared prompts, and `make_step`, as the learner runs them. Arm `plain`: right-padded
sequences through transformers' own SDPA attention, one forward and backward pass, clipping, fused AdamW; no metrics,
no entropy. Advantages, token weights, surrogate and correction are the catalogue's GRPO in both arms. Before every
pair the arms get the same weights, and their losses must agree.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from benchmarks import harness
from examples import tiny_model
from millrace.core.recipe import load
from millrace.core.types import (
    Floats,
    Group,
    GroupId,
    GroupVerdict,
    Prompt,
    Rollout,
    Verdict,
    VerdictKind,
    VersionRun,
    rollouts_of,
)
from millrace.learner.assemble import Assembled, assemble
from millrace.learner.config import OptimiserConfig
from millrace.learner.judged import Judged
from millrace.learner.model import Policy, load_model
from millrace.learner.objective import Objective
from millrace.learner.optimiser import Optimiser
from millrace.learner.sequences import Sequences
from millrace.learner.step import make_step

PROMPT_TOKENS = 12
GROUP_SIZE = 8
LOSS_GAP = 1e-6
SHORT, LONG_TAIL = "short uniform", "long-tailed"
GROUPS = {SHORT: 16, LONG_TAIL: 4}
TARGET = {SHORT: 0.95, LONG_TAIL: 1.5}
PADDING_TARGET = 0.03
SETTINGS = OptimiserConfig(learning_rate=1e-4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Judged groups of one step."""

    groups: list[Group]
    verdicts: list[GroupVerdict]

    @property
    def tokens(self) -> int:
        return sum(group.tokens for group in self.groups)


def lengths(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Response lengths of a group, tokens: 6..20, or log-normal with a 99th percentile of about 8 medians, cut."""
    if kind == SHORT:
        return rng.integers(6, 21, GROUP_SIZE)
    room = tiny_model.CONTEXT_TOKENS - PROMPT_TOKENS
    return np.clip(rng.lognormal(np.log(30), 0.9, GROUP_SIZE).astype(int), 4, room)


def batch(kind: str, rng: np.random.Generator, vocabulary: int) -> Batch:
    """Random rollouts; scores are continuous, so that no group is skipped for having none to compare."""
    groups, verdicts = [], []
    for draw in range(GROUPS[kind]):
        rollouts = tuple(
            Rollout(
                tokens_T=rng.integers(4, vocabulary, many, dtype=np.int32),
                sampled_T=np.ones(many, np.bool_),
                behaviour_logprob_T=rng.normal(-np.log(vocabulary), 1, many).astype(np.float32),
                versions=(VersionRun(0, 0, many),),
                finish_reason="stop",
                seed=0,
            )
            for many in lengths(kind, rng).tolist()
        )
        tokens_P = rng.integers(4, vocabulary, PROMPT_TOKENS, dtype=np.int32)
        prompt = Prompt(id=str(draw), text="", tokens_P=tokens_P)
        group = Group(id=GroupId(draw, 0), prompt=prompt, rollouts=rollouts, lease_epoch=0)
        scores = rng.normal(size=GROUP_SIZE).tolist()
        groups.append(group)
        verdicts.append(
            GroupVerdict(id=group.id, verdicts=tuple(Verdict(kind=VerdictKind.SCORED, score=x) for x in scores))
        )
    return Batch(groups=groups, verdicts=verdicts)


class Ours:
    """The learner's step."""

    def __init__(self, directory: str, objective: Objective) -> None:
        self.model = load_model(directory, device=torch.device("cpu"))
        self._policy = Policy(self.model)
        self._objective = objective
        self._optimiser = Optimiser(self.model.named_parameters(), SETTINGS)
        self.rows = 0
        self.made: Assembled | None = None

    def step(self, data: Batch) -> float:
        """Make it; returns the loss."""
        pairs = zip(data.groups, data.verdicts, strict=True)
        judged = [Judged.of(group, verdict, [0] * len(group.rollouts)) for group, verdict in pairs]
        made = assemble(judged, self._objective, token_budget=16_384)
        self.rows, self.made = made.rows, made
        numbers = make_step(self._policy, self._objective, self._optimiser, made.updates[0], name=str)
        return numbers.loss


class Plain:
    """A padded step, written by hand."""

    def __init__(self, directory: str, objective: Objective) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
        self.model.eval()
        self._objective = objective
        self._optimiser = torch.optim.AdamW(
            self.model.parameters(),
            lr=SETTINGS.learning_rate,
            betas=SETTINGS.betas,
            eps=SETTINGS.epsilon,
            weight_decay=0.0,
            fused=True,
        )
        self.rows = 0

    def step(self, data: Batch) -> float:
        """Make it; returns the loss."""
        tokens, present, answer, behaviour = _padded(data)
        self.rows = tokens.numel()
        advantage_N, weight_N = self._weighed(data)
        logits = self.model(input_ids=tokens, attention_mask=present, use_cache=False).logits[:, :-1]
        logprob_N = torch.log_softmax(logits, -1).gather(2, tokens[:, 1:, None])[..., 0][answer]
        have = {
            "logprob_N": logprob_N,
            "proximal_logprob_N": logprob_N.detach(),
            "behaviour_logprob_N": behaviour,
            "advantage_N": advantage_N,
        }
        assert self._objective.ratio is not None and self._objective.surrogate is not None
        have["ratio_N"] = self._objective.ratio.call(have)
        loss_N = self._objective.surrogate.call(have)
        for correction in self._objective.corrections:
            loss_N = loss_N * correction.call(have)
        loss = (weight_N * loss_N).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), SETTINGS.clip_norm)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _weighed(self, data: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantage and weight of every response token, rollout by rollout."""
        lengths_S = np.array([len(rollout) for rollout in rollouts_of(data.groups)])
        advantages: list[Floats] = []
        for group, verdict in zip(data.groups, data.verdicts, strict=True):
            reward_G = np.array([each.score for each in verdict.verdicts], np.float32)
            sequences = Sequences([len(rollout) for rollout in group.rollouts])
            advantages.append(self._objective.advantages({"reward_G": reward_G, "sequences": sequences}))
        group_S = np.repeat(np.arange(len(data.groups)), GROUP_SIZE)
        weight_N = self._objective.token_weights(Sequences(lengths_S), group_S=group_S)
        return torch.from_numpy(np.concatenate(advantages)), torch.from_numpy(weight_N)


def _padded(data: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [S, L] and which are there, which predictions [S, L-1] are of answers, and the answers' logprobs [N]."""
    pairs = [(group.prompt.tokens_P, rollout) for group in data.groups for rollout in group.rollouts]
    longest = max(len(prompt_P) + len(rollout) for prompt_P, rollout in pairs)
    tokens = np.zeros((len(pairs), longest), np.int64)
    present = np.zeros((len(pairs), longest), np.int64)
    answer = np.zeros((len(pairs), longest - 1), np.bool_)
    for at, (prompt_P, rollout) in enumerate(pairs):
        start, end = len(prompt_P), len(prompt_P) + len(rollout)
        tokens[at, :start], tokens[at, start:end] = prompt_P, rollout.tokens_T
        present[at, :end] = 1
        answer[at, start - 1 : end - 1] = True
    behaviour = np.concatenate([rollout.behaviour_logprob_T for _, rollout in pairs])
    return (*map(torch.from_numpy, (tokens, present, answer, behaviour)),)  # type: ignore[return-value]  # four


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Of the forward passes of a batch: everything but attention works on the packed rows, which hold no padding."""

    operations: float  # share of all operations that is on padded queries or keys
    attention_operations: float  # the same within attention
    attention_rows: float  # share of attention's query rows that is padding


def padding(made: Assembled, config: PreTrainedConfig) -> Padding:
    """Count it, bucket by bucket; a rectangle of queries by keys counts whole, as it is computed."""
    micros = [micro for update in made.updates for micro in update]
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = hidden // heads
    block = hidden * width * (2 * heads + 2 * config.num_key_value_heads) + 3 * hidden * config.intermediate_size
    matrices = sum(
        2 * (block * config.num_hidden_layers * len(m.token_C) + hidden * config.vocab_size * len(m.token_N))
        for m in micros
    )
    per_pair = 4 * heads * width * config.num_hidden_layers
    computed = per_pair * sum(b.query_BQ.numel() * b.key_BK.shape[1] for m in micros for b in m.plan.buckets)
    runs = [m.plan.runs for m in micros]
    needed = per_pair * sum(int((r.length_R * (r.length_R + r.prompt_length_R)).sum()) for r in runs)
    cells, padded = (sum(getattr(m.plan, name) for m in micros) for name in ("cells", "padded_cells"))
    return Padding(
        operations=(computed - needed) / (matrices + computed),
        attention_operations=1 - needed / computed,
        attention_rows=1 - cells / padded,
    )


def padding_row(kind: str, directory: str, where: str, *, batches: int = 8) -> harness.Row:
    """The share of the work on packed batches that is padding, counted."""
    ours = Ours(directory, Objective.of(load("grpo", root=Path.cwd()).objective))
    rng = np.random.default_rng(0)
    config = ours.model.config
    found = []
    for _ in range(batches):
        ours.step(batch(kind, rng, int(config.vocab_size)))
        assert ours.made is not None
        found.append(padding(ours.made, config))
    mean = {name: float(np.mean([getattr(one, name) for one in found])) for name in Padding.__slots__}
    details = {"batches": batches, "rows_of_linear_layers_that_are_padding": 0.0, **mean}
    what = f"share of the operations of packed batches that is padding, {kind} lengths"
    id = f"P7/padding-{kind.split()[0]}"
    return harness.row(id, what, mean["operations"], target=("<=", PADDING_TARGET), where=where, details=details)


def compare(kind: str, directory: str, *, pairs: int, warm: int = 3) -> tuple[harness.Ratio, dict[str, object]]:
    """Ratio plain / ours of the seconds per step, that is ours / plain of the speed, and what else was seen."""
    objective = Objective.of(load("grpo", root=Path.cwd()).objective)
    ours, plain = Ours(directory, objective), Plain(directory, objective)
    rng = np.random.default_rng(0)
    vocabulary = int(ours.model.config.vocab_size)
    held: list[Batch] = []
    losses: dict[str, float] = {}
    gaps: list[float] = []

    def timed(name: str, arm: Ours | Plain) -> float:
        began = time.perf_counter()
        losses[name] = arm.step(held[-1])
        return time.perf_counter() - began

    def run_plain() -> float:
        held.append(batch(kind, rng, vocabulary))
        ours.model.load_state_dict(plain.model.state_dict())
        return timed("plain", plain)

    def run_ours() -> float:
        seconds = timed("ours", ours)
        gaps.append(abs(losses["ours"] - losses["plain"]))
        assert gaps[-1] <= LOSS_GAP, f"losses {losses} of the same rollouts differ by {gaps[-1]:.2g}"
        return seconds

    quiet = harness.interleave({"plain": run_plain, "ours": run_ours}, pairs=pairs, warm=warm, say=lambda line: None)
    details: dict[str, object] = {
        "pairs": pairs,
        "plain_ms": 1e3 * float(np.median(quiet["plain"])),
        "ours_ms": 1e3 * float(np.median(quiet["ours"])),
        "ours_tokens_per_s": held[-1].tokens / float(np.median(quiet["ours"])),
        "largest_loss_gap": max(gaps),
        "rows_padded_over_packed": plain.rows / ours.rows,
        "limit": "1 / fill: rows that are computed at least, prompts once per group",
    }
    return harness.ratio(quiet["plain"], quiet["ours"]), details


def main() -> None:
    """Measure both kinds of lengths."""
    parser = harness.arguments(__doc__)
    parser.set_defaults(pairs=60)
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    torch.set_num_threads(1)
    where = harness.machine()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        tiny_model.build(Path(directory))
        for kind in (SHORT, LONG_TAIL):
            found, details = compare(kind, directory, pairs=given.pairs)
            what = f"learner / plain padded torch step, tokens/s, {kind} lengths"
            id = f"P7/{kind.split()[0]}"
            rows.append(harness.row(id, what, found, target=(">=", TARGET[kind]), where=where, details=details))
            rows.append(padding_row(kind, directory, where))
            print(f"  {kind}: {details}")
    if given.no_record:
        print(*(f"{row.id} {row.value:.3f} {row.interval}" for row in rows), sep="\n")
    else:
        harness.record(rows)


if __name__ == "__main__":
    main()
