"""How components are watched and restarted. Imports no Ray."""

from typing import Self

from pydantic import Field, model_validator

from millrace.core.config import Config


class SuperviseConfig(Config):
    """When a component counts as lost, and how often it is started again."""

    hang_s: float = Field(default=8.0, gt=0)
    """A component that answers nothing for so long, and whose process does not compute either, is ended: it is
    stopped, or blocked for good."""

    busy_s: float = Field(default=60.0, gt=0)
    """The same for a component whose process computes meanwhile."""

    start_s: float = Field(default=300.0, gt=0)
    """How long a component may take from its start to its first answer: loading a model is part of it."""

    restarts: int = Field(default=10, ge=0)
    """How often a component may be lost within `window_s`; beyond it the run ends. Losses that a prompt is to blame
    for do not count; that takes `loop.crashes` losses to tell, so allow more. An error that a component raises itself
    counts five times, since it seldom goes away; one that could not be constructed anew counts twice."""

    window_s: float = Field(default=600.0, gt=0)
    """The time over which `restarts` is counted."""

    backoff_s: float = Field(default=0.5, ge=0)
    """Before the first restart; twice as long before each further one within `window_s`."""

    backoff_most_s: float = Field(default=30.0, ge=0)
    """No restart waits longer."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.busy_s < self.hang_s:
            raise ValueError(
                f"busy_s = {self.busy_s:g} is less than hang_s = {self.hang_s:g}: one that computes is given more time "
                "than one that does not"
            )
        return self
