"""What the learner makes of a group before it learns from it: words for shapers, filters, selections and advantages.

    group with verdicts -> its validly judged members -> words (core/words.py: GROUP, JUDGED) -> rewards, and the
    rule that filters it

The verdicts of the whole group are there first; shapers see all of them at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec
import numpy as np
from transformers import PreTrainedTokenizerBase

from millrace.core.errors import TrainingError
from millrace.core.types import Floats, Group, GroupVerdict, Ints, Verdict, VerdictKind
from millrace.learner.sequences import Sequences

Decode = Callable[[Sequence[Ints]], Sequence[str]]  # token arrays -> texts, special tokens left out


class Shaping(Protocol):
    """A recipe's shapers and filters. The learner is told which in cluster/wiring.py."""

    @property
    def words(self) -> frozenset[str]:
        """Every word that some of its methods ask for."""
        ...

    def shape(self, have: Mapping[str, Any]) -> Floats:
        """reward_G out of a group's words, its scores being the first reward_G."""
        ...

    def keep(self, have: Mapping[str, Any]) -> str:
        """The rule by which the shaped group is filtered, "" for none."""
        ...

    def memory(self) -> Mapping[str, Any]: ...

    def restore(self, saved: Mapping[str, Any]) -> None: ...


class Unshaped:
    """Reward = the verifier's score, and every group is kept."""

    words: frozenset[str] = frozenset()

    def shape(self, have: Mapping[str, Any]) -> Floats:
        reward_G: Floats = have["reward_G"]
        return reward_G

    def keep(self, have: Mapping[str, Any]) -> str:
        return ""

    def memory(self) -> Mapping[str, Any]:
        return {}

    def restore(self, saved: Mapping[str, Any]) -> None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """One group of a batch, before and after shaping."""

    group: Group
    members: Group  # those that have a score
    places: tuple[int, ...]  # of the members in the group
    verdicts: tuple[Verdict, ...]  # of the members
    lags: tuple[Ints, ...]  # lag_T of every rollout of the group, members or not
    scored: Mapping[str, Floats]  # words of core/words.py SCORED, over the members' response tokens, end to end
    reward_G: Floats  # of the members: scores, then shaped
    use: int = 0  # how many batches trained it before
    rule: str = ""  # that filters the group

    @property
    def sequences(self) -> Sequences:
        """The members' response tokens."""
        return Sequences([len(rollout) for rollout in self.members.rollouts])

    @staticmethod
    def of(group: Group, verdict: GroupVerdict, lag: Sequence[int], use: int = 0) -> "Judged":
        """Pair a group with its verdicts and lags, as the queue hands them out.

        Raises:
            TrainingError: they do not belong together.
        """
        if verdict.id != group.id or len(verdict.verdicts) != len(group.rollouts):
            raise TrainingError(f"{group.id} came with the {len(verdict.verdicts)} verdicts of {verdict.id}")
        places = [at for at, each in enumerate(verdict.verdicts) if each.kind is not VerdictKind.JUDGE_FAILED]
        kept = tuple(verdict.verdicts[at] for at in places)
        return Judged(
            group=group,
            members=msgspec.structs.replace(group, rollouts=tuple(group.rollouts[at] for at in places)),
            places=tuple(places),
            verdicts=kept,
            lags=tuple(lags_of(group, lag)),
            scored={},
            reward_G=np.array([each.score for each in kept], np.float32),
            use=use,
        )

    def words(self, *, step: int) -> dict[str, Any]:
        """Its GROUP words."""
        rollouts = self.members.rollouts
        none = [np.empty(0, np.float32)]
        return {
            "reward_G": self.reward_G,
            "length_G": np.array([len(rollout) for rollout in rollouts], np.int64),
            "truncated_G": np.array([rollout.finish_reason == "length" for rollout in rollouts], np.bool_),
            "step": step,
            "sequences": self.sequences,
            "behaviour_logprob_N": np.concatenate([*none, *(r.behaviour_logprob_T for r in rollouts)]),
            "staleness_N": np.concatenate([np.empty(0, np.int32), *(self.lags[place] for place in self.places)]),
            **self.scored,
        }

    def judged_words(self, asked: frozenset[str], *, max_tokens: int, decode: Decode) -> dict[str, Any]:
        """Its JUDGED words, before shaping; texts are made only where they are asked for."""
        prompt = self.members.prompt
        have: dict[str, Any] = {
            "score_G": self.reward_G,
            "failed_G": np.array([each.kind is VerdictKind.SUBJECT_FAILED for each in self.verdicts], np.bool_),
            "components_G": self._components(),
            "answer": prompt.answer,
            "prompt": prompt.text,
            "row": prompt.row,
            "max_tokens": max_tokens,
        }
        if "text_G" in asked:
            have["text_G"] = list(decode([rollout.tokens_T for rollout in self.members.rollouts]))
        return have

    def _components(self) -> dict[str, Floats]:
        names = sorted({name for each in self.verdicts for name in each.components})
        return {
            name: np.array([each.components.get(name, np.nan) for each in self.verdicts], np.float32) for name in names
        }

    def shaped(self, shaping: Shaping, *, step: int, max_tokens: int, decode: Decode) -> "Judged":
        """With its rewards shaped, and the rule that filters it; of a further use the filters are not asked again.

        Raises:
            TrainingError: shaping returned anything but one finite number per member.
        """
        have = self.words(step=step) | self.judged_words(shaping.words, max_tokens=max_tokens, decode=decode)
        reward_G = np.asarray(shaping.shape(have), np.float32)
        if reward_G.shape != self.reward_G.shape or not np.isfinite(reward_G).all():
            raise TrainingError(
                f"{self.group.id} (prompt {self.group.prompt.id}): shaping made rewards {reward_G.tolist()} of"
                f" {len(self.reward_G)} scores; it must return one finite number per rollout"
            )
        rule = "" if self.use else shaping.keep({**have, "reward_G": reward_G})
        return replace(self, reward_G=reward_G, rule=rule)


def shape_all(
    groups: Sequence[Judged], shaping: Shaping, *, step: int, max_tokens: int, decode: Decode
) -> Iterator[Judged]:
    """All of them shaped, further uses first: these leave no trace in the memory of methods, which have seen them."""
    again = [group for group in groups if group.use]
    remembered = shaping.memory() if again else {}
    yield from [group.shaped(shaping, step=step, max_tokens=max_tokens, decode=decode) for group in again]
    if again:
        shaping.restore(remembered)
    for group in groups:
        if not group.use:
            yield group.shaped(shaping, step=step, max_tokens=max_tokens, decode=decode)


def texts_of(tokenizer: PreTrainedTokenizerBase, responses: Sequence[Ints]) -> Sequence[str]:
    """The texts of token arrays, special tokens left out."""
    texts: Sequence[str] = tokenizer.batch_decode(
        [token_T.tolist() for token_T in responses], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def lags_of(group: Group, lag: Sequence[int]) -> list[Ints]:
    """Per rollout, lag_T: the lags of a group's version runs, in rollout order, spread over their tokens."""
    runs = [run for rollout in group.rollouts for run in rollout.versions]
    if len(runs) != len(lag):
        raise TrainingError(
            f"{group.id}: {len(lag)} lags were sent for {len(runs)} version runs; the queue and the"
            " learner do not run the same release"
        )
    lag_T = np.repeat(np.array(lag, np.int32), [run.end - run.start for run in runs])
    return np.split(lag_T, np.cumsum([len(rollout) for rollout in group.rollouts])[:-1])
