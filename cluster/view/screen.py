"""A run on one screen: what it came to, how fast, and who waits for whom. Pure: the same picture, the same text.

A large terminal gets panels side by side, a small one a line or more per section. Where lines are short, sections
leave in the order of their importance, the least important first; an error is always shown in full.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from millrace.cluster.progress import duration
from millrace.cluster.snapshot import Status
from millrace.cluster.view import curves, flow, health, talk
from millrace.cluster.view.charts import BLOCKS, Glyphs
from millrace.cluster.view.picture import Picture, Row
from millrace.cluster.view.words import Part, fitted, joined, wrapped

PANELS_FROM = (100, 28)  # columns, lines
FOUR_ABREAST = 132  # columns
TITLE = 10  # columns of the titles at the left of a small screen
CHARTED = 7  # lines of a panel beyond which a chart of fixed height is left out
SILENT_S = 20.0  # without a word of the run, after which one says so
STYLES = {"failed": "bold red", "stopped": "yellow", "stopping": "yellow", "finished": "bold green", "running": "green"}


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of the screen: in one line, or in any of `sizes` lines."""

    title: str
    short: Callable[[Picture, int], Text]
    tall: Callable[[Picture, int, int], list[Text]]
    sizes: Callable[[Picture, int], Sequence[int]]
    wanted: Callable[[Picture], bool] = lambda picture: True

    def lines(self, picture: Picture, columns: int, lines: int) -> list[Text]:
        """At most so many."""
        sizes = [size for size in self.sizes(picture, columns) if size <= lines]
        return self.tall(picture, columns, max(sizes)) if sizes else [self.short(picture, columns)]


REWARD = Section("reward", curves.step_curve_short, curves.step_curve_tall, curves.step_curve_sizes)
LOSS = Section("loss", curves.step_curve_short, curves.step_curve_tall, curves.step_curve_sizes)
HELD_OUT = Section("held out", curves.held_out_short, curves.held_out_tall, curves.held_out_sizes)
LAG = Section("lag", flow.lag_short, flow.lag_tall, flow.lag_sizes)
RATES = Section("rates", flow.rates_short, flow.rates_tall, flow.rates_sizes)
DRAWS = Section("draws", flow.draws_short, flow.draws_tall, flow.draws_sizes)
TOKENS = Section("tokens", flow.tokens_short, flow.tokens_tall, flow.tokens_sizes)
WAITS = Section("waits", talk.waits_short, talk.waits_tall, talk.waits_sizes)
HEALTH = Section("health", health.health_short, health.health_tall, health.health_sizes, health.is_news)
EVENTS = Section("events", talk.events_short, talk.events_tall, talk.events_sizes)

IN_ORDER = (HEALTH, REWARD, HELD_OUT, LAG, RATES, WAITS, DRAWS, TOKENS, EVENTS)
BY_IMPORTANCE = (REWARD, HEALTH, HELD_OUT, WAITS, LAG, RATES, DRAWS, EVENTS, TOKENS)
SUPERVISED = (LOSS, RATES, EVENTS)


def render(
    status: Status,
    rows: Sequence[Row],
    events: Sequence[Row],
    width: int,
    height: int,
    *,
    recipe: str = "",
    now_s: float | None = None,
    glyphs: Glyphs = BLOCKS,
) -> RenderableType:
    """One screen.

    Args:
        status: this moment of the run.
        rows: of metrics.jsonl, all or the last ones, in order.
        events: of events.jsonl, likewise.
        width: columns.
        height: lines; only an error that needs more makes it taller.
        now_s: Unix time of looking; by default that of the status.
        glyphs: what the terminal can show.
    """
    picture = Picture(status, rows, events, status.time_s if now_s is None else now_s, recipe, glyphs)
    top: list[RenderableType] = [_title(picture, width), _progress(picture, width)]
    used = 2
    if status.error is not None:
        message = wrapped(f"{status.error['kind']}: {status.error['message']}", max(width - 4, 10))
        top.append(Panel(Text("\n".join(message)), title="failed", title_align="left", border_style="red", width=width))
        used += len(message) + 2
    if picture.stalled:
        box = _stalled(picture, width, height - used)
        top.append(box.renderable)
        used += box.lines
    body = _panels(picture, width, height - used) or _lines(picture, width, height - used)
    return Group(*top, *body)


class Box(NamedTuple):
    """A part of the screen above the sections."""

    renderable: RenderableType
    lines: int


def _stalled(picture: Picture, width: int, height: int) -> Box:
    """What the run says of its standing still: all of it where there is room, else its first line."""
    message = wrapped(picture.stalled, max(width - 4, 10))
    room = height - 3  # of the box's own lines, and for one section
    if room < min(len(message), 3):
        line = _kept(Text(fitted(f"stalled: {message[0]}", width, picture.glyphs.cut), "bold yellow"))
        return Box(line, 1) if height > 0 else Box(Group(), 0)
    if len(message) > room:
        message = [*message[: room - 1], fitted(" ".join(message[room - 1 :]), max(width - 4, 10), picture.glyphs.cut)]
    text = Text("\n".join(message))
    panel = Panel(text, title="stalled", title_align="left", border_style="yellow", width=width)
    return Box(panel, len(message) + 2)


def _title(picture: Picture, width: int) -> Text:
    """Name and recipe to the left, state and age to the right."""
    status, glyphs = picture.status, picture.glyphs
    style = STYLES.get(status.state, "")
    silent_s = picture.now_s - status.time_s
    right = Text()
    if silent_s > SILENT_S and not picture.ended:
        right.append(f"no word for {duration(silent_s)}  ", "bold red")
    age_s = (status.time_s if picture.ended else picture.now_s) - status.started_s
    right.append(status.state, style).append(f"  {duration(max(age_s, 0))}")
    facts = [Part(picture.recipe), Part(f"version {status.version}" if status.version >= 0 else "", "dim")]
    facts += [Part(f"committed {status.committed_step}" if status.step else "", "dim")]
    facts += [Part(f"{status.host} {status.pid}" if status.host else "", "dim")]
    room = width - right.cell_len - 2
    name = fitted(status.name, max(room, 1), glyphs.cut)
    left = joined([Part(name, "bold"), *facts], room, glyphs)
    gap = " " * max(width - left.cell_len - right.cell_len, 1)
    return _kept(Text.assemble(left, gap, right))


def _progress(picture: Picture, width: int) -> Text:
    """Steps made of all steps, as a bar; when it will be done."""
    status, glyphs = picture.status, picture.glyphs
    share = min(status.step / status.steps, 1.0) if status.steps else 0.0
    left = f"step {status.step}/{status.steps} "
    right = f" {share:>4.0%}"
    if not picture.ended:
        right += "  eta " + ("-" if status.eta_s is None else duration(status.eta_s))
    room = max(width - len(left) - len(right), 0)
    done = round(share * room)
    style = "red" if status.state == "failed" else "green"
    return _kept(
        Text.assemble((left, "bold"), (glyphs.done * done, style), (glyphs.left * (room - done), "dim"), right)
    )


def _lines(picture: Picture, width: int, height: int) -> list[RenderableType]:
    """A small screen: titles at the left; as many sections as there are lines, then as much of each."""
    wanted = _wanted(SUPERVISED if picture.supervised else BY_IMPORTANCE, picture)
    columns = width - TITLE
    sizes = dict.fromkeys((section.title for section in wanted[: max(height - 1, 0)]), 1)
    chosen = [section for section in (SUPERVISED if picture.supervised else IN_ORDER) if section.title in sizes]
    spare, grew = height - 1 - len(sizes), True
    while grew:
        grew = False
        for section in wanted:
            now = sizes.get(section.title, 0)
            larger = [size for size in section.sizes(picture, columns) if size > now] if now else []
            cost = larger[0] - now + (now == 1) if larger else 0  # a section of several lines has a free one below
            if larger and cost <= spare:
                sizes[section.title], spare, grew = larger[0], spare - cost, True
    found: list[RenderableType] = [Text()] if chosen else []
    for section in chosen:
        lines = section.lines(picture, columns, sizes[section.title])
        for index, line in enumerate(lines):
            title = section.title if index == 0 else ""
            found.append(_kept(Text.assemble((f"{title:<{TITLE}}", "bold cyan"), line)))
        if sizes[section.title] > 1 and section is not chosen[-1]:
            found.append(Text())
    return found


def _wanted(sections: Sequence[Section], picture: Picture) -> list[Section]:
    """Those that have something to say."""
    return [section for section in sections if section.wanted(picture)]


def _panels(picture: Picture, width: int, height: int) -> list[RenderableType]:
    """A large screen: panels in bands. Nothing if it is not large enough for all of them."""
    if width < PANELS_FROM[0] or height + 2 < PANELS_FROM[1] or picture.supervised:
        return []
    bands: list[tuple[Section, ...]] = [(REWARD, HELD_OUT)]
    bands += [(LAG, RATES, DRAWS, TOKENS)] if width >= FOUR_ABREAST else [(LAG, RATES), (DRAWS, TOKENS)]
    bands += [(HEALTH,)] if HEALTH.wanted(picture) else []
    bands += [(WAITS,), (EVENTS,)]
    inner = [width // len(band) - 4 for band in bands]
    useful = [
        sorted({size for section in band for size in section.sizes(picture, columns)} | {1})
        for band, columns in zip(bands, inner, strict=True)
    ]
    sizes = [_least(band, picture, columns) for band, columns in zip(bands, inner, strict=True)]
    spare = height - sum(size + 2 for size in sizes)
    if spare < 0:
        return []
    grew = True
    while grew:
        grew = False
        for index in (len(bands) - 2, *range(len(bands) - 2), len(bands) - 1):  # who waits, first
            larger = [size for size in useful[index] if size > sizes[index]]
            if larger and larger[0] - sizes[index] <= spare:
                spare, sizes[index], grew = spare - (larger[0] - sizes[index]), larger[0], True
    return [_band(band, picture, width, size) for band, size in zip(bands, sizes, strict=True)]


def _least(band: Sequence[Section], picture: Picture, columns: int) -> int:
    """Lines below which a band is not worth a panel."""
    firsts = [min(section.sizes(picture, columns), default=1) for section in band]
    return max([1, *(first for first in firsts if first <= CHARTED)])


def _band(band: Sequence[Section], picture: Picture, width: int, lines: int) -> RenderableType:
    """Panels side by side; the last one takes the columns that are over."""
    each = width // len(band)
    widths = [each] * (len(band) - 1) + [width - each * (len(band) - 1)]
    grid = Table.grid(padding=0)
    panels = []
    for section, columns in zip(band, widths, strict=True):
        grid.add_column(width=columns)
        content = Text("\n").join(section.lines(picture, columns - 4, lines))
        content.no_wrap, content.overflow = True, "crop"
        panels.append(
            Panel(
                content,
                title=f"[bold cyan not dim]{section.title}[/]",
                title_align="left",
                border_style="dim",
                width=columns,
                height=lines + 2,
            )
        )
    grid.add_row(*panels)
    return grid


def _kept(line: Text) -> Text:
    """On one line, whatever the terminal."""
    line.no_wrap, line.overflow = True, "crop"
    return line
