"""Named places at which a test may end or stop the process. They do nothing unless armed.

`MILLRACE_FAILPOINT=NAME@N=ACTION:MARKER` arms every process that inherits it: at the N-th time that one of them
reaches NAME it creates the file MARKER and is killed (`kill`, SIGKILL) or stopped (`stop`, SIGSTOP). Where the file
exists nothing happens, so that it fires once, however many processes there are and however often they restart.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from millrace.core.errors import ConfigError

VARIABLE = "MILLRACE_FAILPOINT"
Hook = Callable[[str], None]

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def reach(name: str) -> None:
    """This place of the program, by name."""
    if _hook is not None:
        _hook(name)


def armed() -> bool:
    """Whether anything may happen at a failpoint."""
    return _hook is not None


def arm(hook: Hook | None) -> None:
    """Call `hook` with the name of every failpoint of this process from now on; None disarms.

    >>> names = []; arm(names.append); reach("journal.seal"); arm(None); reach("journal.seal"); names
    ['journal.seal']
    """
    global _hook
    _hook = hook


def parsed(text: str) -> Hook:
    """The hook that the environment variable describes.

    Raises:
        ConfigError: the text has another form.
    """
    place, _, rest = text.partition("=")
    action, _, marker = rest.partition(":")
    name, _, number = place.partition("@")
    if not name or not number.isdigit() or action not in _SIGNALS or not marker:
        raise ConfigError(
            f"{VARIABLE}={text!r} is not of the form NAME@N=kill:MARKER or NAME@N=stop:MARKER, with N from 1 on "
            "and MARKER the path of a file; unset it if no failure is wanted"
        )
    seen: Counter[str] = Counter()

    def hook(reached: str) -> None:
        seen[reached] += 1
        if reached == name and seen[name] == int(number):
            try:
                Path(marker).touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), _SIGNALS[action])

    return hook


_hook: Hook | None = parsed(os.environ[VARIABLE]) if VARIABLE in os.environ else None
