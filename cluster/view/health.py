"""The section about components that were lost, and prompts that were given up. Pure; only there when there are any."""

from collections.abc import Sequence

from rich.text import Text

from millrace.cluster.view.picture import Picture
from millrace.cluster.view.words import Part, fitted, joined

STYLES = {"given up": "bold red"}


def is_news(picture: Picture) -> bool:
    """Something was lost, is down, or was given up."""
    status = picture.status
    return bool(status.incidents or status.down or status.quarantined)


def health_short(picture: Picture, columns: int) -> Text:
    """What is down, restarts, prompts that were given up, and as much of the last incident as fits."""
    status, glyphs = picture.status, picture.glyphs
    line = joined([*_down(picture), *_counts(picture)], columns, glyphs)
    room = columns - line.cell_len - 3
    if status.incident and room >= 12:
        line.append(f" {glyphs.dot} " if line else "", "dim").append(fitted(status.incident, room, glyphs.cut), "dim")
    return line


def health_tall(picture: Picture, columns: int, lines: int) -> list[Text]:
    """Components by state with their restarts; the last incident; the last prompt that was given up."""
    return _lines(picture, columns)[:lines]


def health_sizes(picture: Picture, columns: int) -> Sequence[int]:
    """A line each."""
    return range(2, len(_lines(picture, columns)) + 1)


def _lines(picture: Picture, columns: int) -> list[Text]:
    status, glyphs = picture.status, picture.glyphs
    serving = sum(each["state"] == "serving" for each in status.components.values())
    parts = [*_down(picture), Part(f"{serving} serving" if serving else "", "dim")]
    found = [joined([*parts, Part(_restarts(picture))], columns, glyphs)]
    if found[0].plain.endswith(glyphs.cut):
        found = [joined([*parts, Part(_many(status.restarts, "restart"))], columns, glyphs)]
    if status.incident:
        said = f"{status.incidents} incidents, the last: " if status.incidents > 1 else ""
        found.append(Text(fitted(said + status.incident, columns, glyphs.cut), "dim"))
    if status.quarantined:
        found.append(Text(fitted(_quarantined(picture), columns, glyphs.cut), "yellow"))
    return [line for line in found if line]


def _down(picture: Picture) -> list[Part]:
    return [
        Part(f"{name} {each['state']}", STYLES.get(each["state"], "bold yellow"))
        for name, each in picture.status.down.items()
    ]


def _counts(picture: Picture) -> list[Part]:
    """Restarts and prompts, in numbers."""
    status = picture.status
    return [
        Part(_many(status.restarts, "restart")),
        Part(_many(status.quarantined, "prompt") + " quarantined" if status.quarantined else "", "yellow"),
    ]


def _restarts(picture: Picture) -> str:
    """Of whom, the most often restarted first."""
    again = sorted(picture.status.components.items(), key=lambda pair: -pair[1]["restarts"])
    whose = ", ".join(f"{name} {each['restarts']}" for name, each in again if each["restarts"])
    return f"{_many(picture.status.restarts, 'restart')}: {whose}" if whose else ""


def _quarantined(picture: Picture) -> str:
    """How many, and the last one's name and cause."""
    many = _many(picture.status.quarantined, "prompt") + " quarantined"
    last = picture.last("quarantined")
    if last is None:
        return many
    cause = " ".join(str(last.get("cause", "")).split())
    return f"{many}, the last: {last.get('prompt', '')}" + (f" ({cause})" if cause else "")


def _many(number: int, what: str) -> str:
    """`2 restarts`; nothing for none."""
    return f"{number} {what}{'' if number == 1 else 's'}" if number else ""
