"""Every method of every catalogue: one line, formula, source, arguments, returns, an example that runs."""

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.core import catalogue, recipe, words
from millrace.learner.objective import FOLDERS, Objective
from millrace.rewards import judge, shaping

ROOT = Path(__file__).resolve().parents[2]
CATALOGUES = {**FOLDERS, **shaping.FOLDERS, "verifier": judge.FOLDER}
METHODS = [(slot, folder, name) for slot, folder in CATALOGUES.items() for name in catalogue.names(folder)]
# What a method of each slot may ask for; of a verifier also columns, as countdown's.
ASKS = {**words.SLOTS, "verifier": frozenset(judge.WORDS) | {"numbers", "target"}}
# Settings without a default -> some value.
REQUIRED: dict[str, dict[str, Any]] = {
    "constant_length": {"length": 100},
    "gate": {"component": "format"},
    "isolated": {"verifier": "exact"},
    "matches": {"pattern": "4"},
    "max_variance": {"size": 4},
    "regex": {"pattern": "4"},
    "scheduled": {"shaper": "overlong", "steps": 10},
    "weighted": {"weights": {"format": 0.5}},
}
SOURCE = re.compile(r"Source: .*?(arXiv:\d{4}\.\d{4,5}|doi:10\.\d+/\S+)", re.DOTALL)


def wrong_with(method: Any, word_shapes: bool = True) -> Iterator[str]:
    """What layout.md section 7 asks of a docstring and this one lacks."""
    text = inspect.getdoc(method) or ""
    lines = text.splitlines()
    if not lines or not lines[0].endswith(".") or any(lines[1:2]):
        yield "no summary in one line"
    if not re.search(r"^    \S.*=.*", text.partition("Source:")[0], re.MULTILINE):
        yield "no indented formula before its source"
    if not SOURCE.search(text):
        yield "no 'Source: Title (Authors year), arXiv:...'"
    parameters = list(inspect.signature(method).parameters)
    if inspect.isclass(method):  # its fields are settings, its call's parameters are words
        asked = list(inspect.signature(method.__call__).parameters.values())[1:]
        parameters += [p.name for p in asked if p.kind is not p.VAR_POSITIONAL]
    arguments = text.partition("Args:")[2].partition("Returns:")[0]
    yield from (f"parameter {p} is not under Args:" for p in parameters if f"    {p}:" not in arguments)
    if "Returns:" not in text or (word_shapes and not re.search(r"Returns:\n\s+\w+_[NG]\b", text)):
        yield "no 'Returns:' that begins with the name and shape of what it returns"
    if not doctest.DocTestParser().get_examples(text):
        yield "no example"


@pytest.mark.parametrize(("slot", "folder", "name"), METHODS)
def test_every_method_is_documented(slot: str, folder: str, name: str) -> None:
    returns_an_array = slot not in ("filter", "verifier", "reference")
    assert list(wrong_with(getattr(importlib.import_module(folder), name), returns_an_array)) == []


@pytest.mark.parametrize(("slot", "folder", "name"), METHODS)
def test_every_example_runs(slot: str, folder: str, name: str) -> None:
    method = getattr(importlib.import_module(folder), name)
    module = importlib.import_module(method.__module__)
    (test,) = doctest.DocTestFinder(recurse=False).find(method, name, module, vars(module).copy())
    failed, tried = doctest.DocTestRunner(verbose=False).run(test)
    assert tried > 0 and failed == 0


@pytest.mark.parametrize(("slot", "folder", "name"), METHODS)
def test_every_parameter_is_a_word_or_a_setting_with_a_type(slot: str, folder: str, name: str) -> None:
    """Resolution itself checks the words; what is keyword-only must be annotated, or its type is not checked."""
    method = getattr(importlib.import_module(folder), name)
    spec = {"name": name, **REQUIRED.get(name, {})}
    resolved = catalogue.resolve(spec, folder=folder, words=ASKS[slot], slot=slot)
    assert resolved.words <= ASKS[slot]
    assert set(resolved.settings) <= set(inspect.get_annotations(method))


@pytest.mark.parametrize("folder", CATALOGUES.values())
def test_a_catalogue_lists_all_that_its_files_define(folder: str) -> None:
    package = importlib.import_module(folder)
    assert package.__file__ is not None
    defined = {
        name
        for path in Path(package.__file__).parent.glob("[a-z]*.py")
        for name, value in vars(importlib.import_module(f"{folder}.{path.stem}")).items()
        if inspect.isfunction(value) or (inspect.isclass(value) and "__call__" in vars(value))
        if not name.startswith("_") and value.__module__ == f"{folder}.{path.stem}"
    }
    assert sorted(defined) == list(package.__all__), "__all__ is all of them, sorted"
    assert not {path.stem for path in Path(package.__file__).parent.glob("*.py")} & defined, "a file hides its function"


def test_names_are_unique_over_the_slots_of_a_loss() -> None:
    """Metrics and `millrace list` name methods by folder and name; the words of a slot are never a method's name."""
    for slot, _folder, name in METHODS:
        assert name not in words.TOKENS and name not in words.GROUP, (slot, name)


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_composes_and_names_its_paper(name: str) -> None:
    text = (ROOT / "recipes" / f"{name}.toml").read_text()
    head = text.partition("\n\n")[0]
    assert re.match(r"# .+\(.+ \d{4}\), arXiv:\d{4}\.\d{5}", head), head
    assert len(text.splitlines()) <= 20
    loaded = recipe.load(name)
    objective = Objective.of(loaded.objective, models=frozenset({"reference"}))
    assert objective.learns_from_rewards == (loaded.rewards.verifier is not None)


def test_the_check_finds_what_is_missing() -> None:
    def bare(reward_G: float, *, scale: float = 1.0) -> float:
        """Does something."""
        return reward_G * scale

    assert list(wrong_with(bare)) == [
        "no indented formula before its source",
        "no 'Source: Title (Authors year), arXiv:...'",
        "parameter reward_G is not under Args:",
        "parameter scale is not under Args:",
        "no 'Returns:' that begins with the name and shape of what it returns",
        "no example",
    ]
