"""What there is to choose from: every catalogue and what is in it, read from the source without importing it.

millrace list                     every entry of every catalogue, a line each
millrace list surrogates          of one
millrace show surrogates.clip     the docstring of one entry
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from millrace.core.errors import ConfigError, nearest

RECIPES = "recipes"
ENGINES = "engines"
# In the order in which a rollout meets them.
PLACES = {
    RECIPES: "recipes",
    "surrogates": "learner/surrogates",
    "advantages": "learner/advantages",
    "selections": "learner/selections",
    "normalisers": "learner/normalisers",
    "proximals": "learner/proximals",
    "ratios": "learner/ratios",
    "corrections": "learner/corrections",
    "penalties": "learner/penalties",
    "references": "learner/references",
    "aggregations": "learner/aggregations",
    "objectives": "learner/objectives",
    "verifiers": "rewards/verifiers",
    "shapers": "rewards/shapers",
    "filters": "rewards/filters",
    ENGINES: "actors/engines",
    "datasets": "actors/datasets",
    "selectors": "core/replay/selectors.py",
}
EVERY_ENGINE = frozenset({"self", "model", "slots", "max_model_len", "dtype", "seed"})  # set by the run


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that a recipe or a run may name."""

    catalogue: str
    name: str
    settings: Mapping[str, str]  # what may be set -> its default as written, "" where it must be given
    text: str  # its docstring, or a recipe's file

    @property
    def first(self) -> str:
        """The line that says what it is."""
        lines = self.text.strip().splitlines() or [""]
        return lines[0].lstrip("# ").rstrip(",")

    @property
    def call(self) -> str:
        """`name(setting=default, ...)`."""
        inner = ", ".join(f"{key}={value}" if value else key for key, value in self.settings.items())
        return f"{self.name}({inner})" if inner else self.name


def entries(catalogue: str) -> list[Entry]:
    """All entries of one catalogue, by name.

    Raises:
        ConfigError: there is no such catalogue.

    >>> [entry.call for entry in entries("surrogates") if entry.name == "clip"]
    ['clip(low=0.2, high=0.2, dual=None)']
    """
    if catalogue not in PLACES:
        raise ConfigError(f"there is no catalogue '{catalogue}'{nearest(catalogue, PLACES)} There are {_all(PLACES)}")
    place = files("millrace")
    for part in PLACES[catalogue].split("/"):
        place = place / part
    if catalogue == RECIPES:
        found: Iterator[Entry] = _recipes(place)
    elif catalogue == ENGINES:
        found = _engines(place)
    else:
        found = _methods(catalogue, place)
    return sorted(found, key=lambda entry: entry.name)


def find(name: str) -> list[Entry]:
    """The entries of a name, `"clip"` or `"surrogates.clip"`; a recipe comes first.

    Raises:
        ConfigError: there is none.
    """
    catalogue, _, last = name.rpartition(".")
    known = [entry for each in ([catalogue] if catalogue else PLACES) for entry in entries(each)]
    found = [entry for entry in known if entry.name == last]
    if not found:
        close = nearest(last, [entry.name for entry in known])
        raise ConfigError(f"there is no recipe and no method '{name}'{close or '.'} `millrace list` shows them all")
    return found


def listed(catalogues: Iterable[str] = tuple(PLACES), *, columns: int | None = None) -> Iterator[str]:
    """Lines for a person: a title per catalogue, an entry per line.

    Args:
        columns: lines are cut to so many.
    """
    for catalogue in catalogues:
        found = entries(catalogue)
        if not found:
            continue
        yield f"{catalogue}  ({PLACES[catalogue]})"
        width = max(len(entry.call) for entry in found if len(entry.call) <= 44) if found else 0
        for entry in found:
            line = f"  {entry.call:<{width}}  {entry.first}"
            yield line if columns is None or len(line) <= columns else line[: columns - 3] + "..."
        yield ""


def _recipes(place: Any) -> Iterator[Entry]:
    for file in place.iterdir():
        if file.name.endswith(".toml"):
            yield Entry(RECIPES, file.name.removesuffix(".toml"), {}, file.read_text(encoding="utf-8"))


def _engines(place: Any) -> Iterator[Entry]:
    for node in _parsed(place / "__init__.py").body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "ENGINES":
            for name, cls in ast.literal_eval(node.value).items():
                (made,) = (each for each in _defined(place / f"{name}.py") if each.name == cls)
                assert isinstance(made, ast.ClassDef)
                starts = [each for each in made.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
                settings = _keywords(starts[0]) if starts else {}
                own = {key: value for key, value in settings.items() if key not in EVERY_ENGINE}
                yield Entry(ENGINES, name, own, ast.get_docstring(made) or "")


def _methods(catalogue: str, place: Any) -> Iterator[Entry]:
    """Those that `__all__` lists, where they are defined."""
    if place.name.endswith(".py"):
        sources, listing = [place], place
    elif (listing := place / "__init__.py").is_file():
        sources = [file for file in place.iterdir() if file.name.endswith(".py")]
    else:
        return
    public = _public(_parsed(listing))
    for file in sources:
        for node in _defined(file):
            if node.name in public:
                settings = _fields(node) if isinstance(node, ast.ClassDef) else _keywords(node)
                yield Entry(catalogue, node.name, settings, ast.get_docstring(node) or "")


@cache
def _parsed(file: Any) -> ast.Module:
    text: str = file.read_text(encoding="utf-8")
    return ast.parse(text, file.name)


def _public(module: ast.Module) -> set[str]:
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def _defined(file: Any) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node for node in _parsed(file).body if isinstance(node, kinds)]


def _keywords(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
    """Its keyword-only parameters."""
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return {each.arg: ast.unparse(default) if default is not None else "" for each, default in pairs}


def _fields(cls: ast.ClassDef) -> dict[str, str]:
    """What a dataclass is made with; its memory, `init=False`, is not."""
    found = {}
    for node in cls.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        default = ast.unparse(node.value) if node.value is not None else ""
        if "init=False" not in default and "ClassVar" not in ast.unparse(node.annotation):
            found[node.target.id] = default
    return found


def _all(names: Iterable[str]) -> str:
    return ", ".join(names)
