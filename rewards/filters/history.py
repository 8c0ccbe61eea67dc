"""Filters that remember what earlier groups of a prompt earned."""

from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from pydantic import PositiveInt

from millrace.core.types import Floats


@dataclass
class mastered:
    """Rejects prompts that have been solved by every rollout, time and again.

        s <- s + 1 if min(r) >= threshold, else 0       s: groups of this prompt in a row that were all solved
        keep = s < groups

    Source: the temporal consistency that Act Only When It Pays (Zheng et al. 2025), arXiv:2506.02177, finds: what was
    uninformative stays so. GRESO skips such prompts before they are generated; here a group is seen, and one rollout
    that fails brings the prompt back.

    Args:
        reward_G: at least `threshold` where solved.
        prompt: its text; what two prompts share in text they share in memory.
        groups: in a row, all solved, from which on the prompt is rejected.
        threshold: in units of the reward.
        most: prompts that are remembered; the ones longest unseen are forgotten first.
        streaks: prompt -> groups in a row.
    Returns:
        Whether to keep the group.

    >>> filter = mastered(groups=2)
    >>> solved, failed = np.ones(2, np.float32), np.array([1, 0], np.float32)
    >>> [filter(reward_G, "2+2=") for reward_G in (solved, solved, solved, failed, solved)]
    [True, False, False, True, True]
    """

    groups: PositiveInt = 3
    threshold: float = 0.5
    most: PositiveInt = 100_000
    streaks: dict[str, int] = field(init=False, default_factory=dict)

    def __call__(self, reward_G: Floats, prompt: str) -> bool:
        key = blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        streak = self.streaks.pop(key, 0) + 1 if bool(np.min(reward_G) >= self.threshold) else 0
        if streak:
            self.streaks[key] = streak  # popped and put back: the order is that of the last visit
            if len(self.streaks) > self.most:
                del self.streaks[next(iter(self.streaks))]
        else:
            self.streaks.pop(key, None)
        return streak < self.groups
