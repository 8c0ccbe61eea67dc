"""Every error that is raised on purpose. Each message names the thing, the value, the cause and the way out.

All take one string, so that they survive a process boundary.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class MillraceError(Exception):
    """The base of all of them."""


class ConfigError(MillraceError, ValueError):
    """The run's configuration cannot work."""


class RecipeError(ConfigError):
    """The recipe cannot be composed, or asks for what the run lacks."""


class DataError(MillraceError, ValueError):
    """A row or a file of the user's data."""


class ModelError(MillraceError, ValueError):
    """A model directory, its tokenizer or its architecture."""


class RewardError(MillraceError):
    """The user's reward function cannot be imported or called."""


class EngineError(MillraceError, RuntimeError):
    """An inference engine failed."""


class EngineDeadError(EngineError):
    """The engine itself is gone: nothing can be asked of it any more. Fatal for the worker that owns it."""


class WeightsError(MillraceError, RuntimeError):
    """Weights that arrived are not the weights that were published. Fatal for the worker."""


class LedgerError(MillraceError, RuntimeError):
    """A request that the ledger's rules forbid."""


class Fenced(LedgerError):
    """The caller's epoch has ended: another incarnation or another worker holds the lease now."""


class JournalError(MillraceError, RuntimeError):
    """The journal on disk cannot be written or read. Names the file; what was accepted before stays."""


class JournalFullError(JournalError):
    """The journal cannot be written now: there is no room on its disk. The same call succeeds when there is some."""


class PayloadError(JournalError):
    """The payload of an accepted group is gone or damaged: the group has to be drawn again."""


class DataBudgetError(MillraceError, RuntimeError):
    """Too many draws are dead of what their prompts do: the data, not the machines. Names the last of them."""


class DeadlineError(MillraceError, TimeoutError):
    """A wait passed its deadline. Names who waited, for what, and what to do."""


class ComponentLost(MillraceError, RuntimeError):
    """A component of the run died or hung, and its restarts are spent."""


class TrainingError(MillraceError, RuntimeError):
    """The optimiser step cannot be taken."""


class CheckpointError(TrainingError):
    """A checkpoint is damaged, or could not be written. Names the file or the directory."""


class DiskFullError(CheckpointError):
    """There is no room for a checkpoint. Names the directory, the bytes it needs and those that are free."""


class UserCodeError(MillraceError):
    """Code that is not ours raised. The message names whose, and carries its traceback's last lines."""


@contextmanager
def boundary(whose: str, error: type[MillraceError] = UserCodeError) -> Iterator[None]:
    """Attribute whatever escapes to its owner. The only place that may catch every exception.

    >>> try:
    ...     with boundary("reward rewards.py:score"):
    ...         1 / 0
    ... except UserCodeError as caught:
    ...     print(caught)
    reward rewards.py:score raised ZeroDivisionError: division by zero
    """
    try:
        yield
    except MillraceError:
        raise
    except Exception as caught:
        raise error(f"{whose} raised {type(caught).__name__}: {caught}") from caught


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or nothing.

    >>> nearest("lerning_rate", ["learning_rate", "seed"])
    "; did you mean 'learning_rate'?"
    """
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
