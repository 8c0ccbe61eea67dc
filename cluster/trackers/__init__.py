"""Outside systems that are told of a run when its configuration asks for it: `tracking = ["wandb"]`.

`kinds.py` says which there are, `running.py` talks to them in threads of their own: none can hold up or end a run.
"""

from millrace.cluster.trackers.kinds import check
from millrace.cluster.trackers.running import Trackers, tracked

__all__ = ["Trackers", "check", "tracked"]
