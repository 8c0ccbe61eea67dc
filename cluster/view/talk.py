"""The sections that are said: who waits for whom, and what happened. Pure."""

from collections.abc import Sequence

from rich.text import Text

from millrace.cluster.gauge import CAUSES
from millrace.cluster.progress import duration
from millrace.cluster.view.picture import WAITING, Picture, Row
from millrace.cluster.view.words import Part, facts_of, fitted, joined, percent, wrapped

MOST_EVENTS = 12
QUIET = frozenset({"evaluated"})  # they are the held-out curve
LOSSES = ("lost", "quarantined", "step skipped", "checkpoint refused", "stalled", "stopped without a checkpoint")
STYLES = {
    **dict.fromkeys(("failed", "given up"), "bold red"),
    **dict.fromkeys(("warning", "interrupted", *LOSSES), "bold yellow"),
}
NAME_COLUMNS = 14


def waits_short(picture: Picture, columns: int) -> Text:
    """The learner's share, and the first worker that waits."""
    waits = picture.status.waits
    causes = _causes(picture)
    mostly = f", mostly for {max(causes, key=lambda cause: causes[cause])}" if causes else ""
    parts = [Part(f"learner waits {percent(_share(picture))}{mostly}", "bold" if _share(picture) >= 0.5 else "")]
    others = [(who, why) for who, why in _waiting(picture) if who != "learner"]
    if not others and "learner" in waits:
        others = [("for", waits["learner"])]
    line = joined(parts, columns, picture.glyphs)
    if others:
        who, why = others[0]
        more = f" +{len(others) - 1}" if len(others) > 1 else ""
        room = columns - line.cell_len - len(who) - len(more) - 5
        if room >= 12:
            line.append(f" {picture.glyphs.dot} ", "dim").append(who).append(": ").append(
                fitted(why, room, picture.glyphs.cut), "dim"
            ).append(more, "dim")
    return line


def waits_tall(picture: Picture, columns: int, lines: int) -> list[Text]:
    """A worker per line, with the whole reason where there is room for it."""
    return _waits(picture, columns, lines)


def waits_sizes(picture: Picture, columns: int) -> Sequence[int]:
    """From a line per worker to all that they say."""
    who = 1 + len([each for each, _ in _waiting(picture) if each != "learner"])
    return range(max(2, who), max(len(_waits(picture, columns, 99)), who) + 1)


def events_short(picture: Picture, columns: int) -> Text:
    """The last one."""
    shown = _events(picture)
    return _event(picture, shown[-1], columns) if shown else Text("none yet", "dim")


def events_tall(picture: Picture, columns: int, lines: int) -> list[Text]:
    """The last ones, the newest at the bottom."""
    return [_event(picture, event, columns) for event in _events(picture)[-lines:]] or [Text("none yet", "dim")]


def events_sizes(picture: Picture, _columns: int) -> Sequence[int]:
    """As many as there are, up to a few."""
    return range(2, min(len(_events(picture)), MOST_EVENTS) + 1)


def _share(picture: Picture) -> float:
    return float(picture.status.learner.get("wait_share") or 0.0)


def _waiting(picture: Picture) -> list[tuple[str, str]]:
    """Who waits, and why. Workers of one kind with one reason share a line."""
    same: dict[tuple[str, str], list[str]] = {}
    for who, why in picture.status.waits.items():
        same.setdefault((who.rpartition("-")[0] or who, why), []).append(who)
    return [
        (names[0] if len(names) == 1 else f"{kind} x{len(names)}", " ".join(why.split()))
        for (kind, why), names in same.items()
    ]


def _learner(picture: Picture) -> str:
    """What it does, and how much of its time it waits."""
    doing = picture.status.learner
    phase = f"{doing['phase']} for {doing.get('phase_s') or 0.0:.1f} s" if doing.get("phase") else "not started"
    why = picture.status.waits.get("learner", "")
    causes = ", ".join(f"{cause} {percent(share)}" for cause, share in _causes(picture).items())
    waits = f"waits {percent(_share(picture))} " + (f"({causes})" if causes else "of its time")
    return f"{waits}; {phase}" + (f": {why}" if why else "")


def _causes(picture: Picture) -> dict[str, float]:
    """What the learner waits for -> its part of the share of its time that it waits, as in the last steps."""
    of_late = {cause: picture.spent.get(WAITING[cause], 0.0) for cause in CAUSES}
    whole = sum(of_late.values())
    return {cause: _share(picture) * each / whole for cause, each in of_late.items() if each}


def _waits(picture: Picture, columns: int, lines: int) -> list[Text]:
    said = [("learner", _learner(picture)), *(pair for pair in _waiting(picture) if pair[0] != "learner")]
    room = max(columns - NAME_COLUMNS, 10)
    spare, found = max(lines - len(said), 0), []
    for who, why in said[:lines]:
        whole = wrapped(why, room)
        kept = whole[: 1 + spare]
        spare -= len(kept) - 1
        if len(kept) < len(whole):
            kept[-1] = fitted(" ".join(whole[len(kept) - 1 :]), room, picture.glyphs.cut)
        for index, text in enumerate(kept):
            name = fitted(who, NAME_COLUMNS - 1, picture.glyphs.cut) if index == 0 else ""
            found.append(Text(f"{name:<{NAME_COLUMNS}}").append(text, "dim" if who != "learner" else ""))
    return found


def _events(picture: Picture) -> list[Row]:
    return [event for event in picture.events if event.get("kind") not in QUIET]


def _event(picture: Picture, event: Row, columns: int) -> Text:
    """When, counted from the start, what, and its facts."""
    since_s = event["time_s"] - picture.status.started_s
    when = duration(since_s) if since_s >= 0 else "before"
    kind = str(event.get("kind", ""))
    style = "bold yellow" if kind.startswith("tracker ") else STYLES.get(kind, "bold")
    line = Text.assemble((f"{when:>7}  ", "dim"), (kind, style), "  ")
    return line.append(fitted(facts_of(event), max(columns - line.cell_len, 0), picture.glyphs.cut))
