"""millrace: asynchronous, off-policy reinforcement-learning post-training of language models on Ray.

from millrace import Job, RunConfig
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millrace.cluster.config import RunConfig
    from millrace.cluster.job import Job

__version__ = "0.1.0"
__all__ = ["Job", "RunConfig", "__version__"]

_PLACES = {"Job": "millrace.cluster.job", "RunConfig": "millrace.cluster.config"}


def __getattr__(name: str) -> Any:
    """Its two classes, imported when they are asked for: a worker that needs neither does not wait for them."""
    if name not in _PLACES:
        raise AttributeError(f"module 'millrace' has no attribute '{name}'")
    return getattr(import_module(_PLACES[name]), name)
