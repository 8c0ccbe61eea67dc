"""Follow a job in the terminal until it has ended: a live screen, or plain lines where there is none."""

import json
import time
import tomllib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console, RenderableType
from rich.live import Live

from millrace.cluster.run_directory import CONFIG, EVENTS, METRICS, Tail
from millrace.cluster.snapshot import Status
from millrace.cluster.view.charts import ASCII, BLOCKS
from millrace.cluster.view.picture import Row
from millrace.cluster.view.screen import render

REFRESH_S = 0.25
KEPT_STEPS = 2000  # rows of the last steps; evaluations are kept all
KEPT_EVENTS = 100


class Job(Protocol):
    """What is followed."""

    @property
    def directory(self) -> Path:
        """The run's."""
        ...

    def status(self) -> Status:
        """This moment of the run."""
        ...

    def lines(self) -> Iterator[str]:
        """Its plain lines as they come, until it has ended."""
        ...


@dataclass
class Feed:
    """What a run directory has said so far, as much of it as a screen can show. Every line is read once."""

    directory: Path
    recipe: str = ""
    evaluations: list[Row] = field(default_factory=list)
    steps: deque[Row] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    events: deque[Row] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))

    def __post_init__(self) -> None:
        self._metrics = Tail(self.directory / METRICS)
        self._events = Tail(self.directory / EVENTS)

    def read(self) -> None:
        """Take in what is new."""
        for row in map(json.loads, self._metrics.read()):
            if "held_out" in row:
                self.evaluations.append(row)
            else:
                if self.steps and row["step"] <= self.steps[-1]["step"]:
                    self._forget(row["step"])
                self.steps.append(row)
        self.events.extend(map(json.loads, self._events.read()))
        self.recipe = self.recipe or recipe_of(self.directory)

    def _forget(self, step: int) -> None:
        """A resumed run makes the steps since its last commit again, this one the first of them."""
        while self.steps and self.steps[-1]["step"] >= step:
            self.steps.pop()
        self.evaluations = [each for each in self.evaluations if each["step"] < step]

    @property
    def rows(self) -> list[Row]:
        return [*self.evaluations, *self.steps]


def recipe_of(directory: Path) -> str:
    """The name of the recipe that a run directory was started with; nothing before it is written."""
    try:
        recipe = tomllib.loads((directory / CONFIG).read_text(encoding="utf-8")).get("recipe", "")
    except FileNotFoundError:
        return ""
    return str(recipe.get("origin", recipe.get("name", "")) if isinstance(recipe, Mapping) else recipe)


def follow(job: Job, *, console: Console | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show a job until it has ended.

    Args:
        console: by default standard output. One that is no terminal, or a dumb one, gets plain lines.
        sleep: between two looks; a test's own.
    """
    console = console or Console()
    if console.is_terminal and not console.is_dumb_terminal:
        _screen(job, console, sleep)
        return
    for text in job.lines():
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _screen(job: Job, console: Console, sleep: Callable[[float], None]) -> None:
    """On the terminal's other screen; the last picture stays on the one that was there before."""
    feed = Feed(job.directory)
    glyphs = BLOCKS if console.encoding.lower().startswith("utf") else ASCII

    def picture(height: int) -> tuple[Status, RenderableType]:
        status = job.status()
        feed.read()
        return status, render(
            status,
            feed.rows,
            feed.events,
            console.width,
            height,
            recipe=feed.recipe,
            now_s=time.time(),
            glyphs=glyphs,
        )

    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            status, screen = picture(console.height)
            live.update(screen, refresh=True)
            if status.ended:
                break
            sleep(REFRESH_S)
    console.print(picture(console.height - 1)[1])
