"""What the lists show, held against what the catalogues really hold."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.actors.engines import ENGINES
from millrace.cluster import catalogues
from millrace.cluster.composed import described
from millrace.core import catalogue as core_catalogue
from millrace.core import recipe
from millrace.core.errors import ConfigError, RecipeError
from millrace.learner.objective import FOLDERS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = {
    name: "millrace." + place.replace("/", ".").removesuffix(".py")
    for name, place in catalogues.PLACES.items()
    if name not in (catalogues.RECIPES, catalogues.ENGINES)
}


def test_every_catalogue_folder_is_listed() -> None:
    assert set(FOLDERS.values()) | {"millrace.rewards.verifiers"} <= set(FOLDER.values())
    folders = {
        f"millrace.{folder.parent.name}.{folder.name}"
        for top in ("learner", "rewards")
        for folder in (ROOT / top).iterdir()
        if (folder / "__init__.py").is_file() and "__all__" in (folder / "__init__.py").read_text()
    }
    assert folders <= set(FOLDER.values())


@pytest.mark.parametrize("name", FOLDER)
def test_a_catalogue_is_what_python_imports(name: str) -> None:
    module = importlib.import_module(FOLDER[name])
    found = catalogues.entries(name)
    assert [entry.name for entry in found] == sorted(module.__all__)
    for entry in found:
        target = getattr(module, entry.name)
        if name in ("datasets", "selectors"):
            assert entry.first
            continue
        needed = {key: 1 for key, default in entry.settings.items() if not default}
        _, _, settings = core_catalogue._signature(entry.name, target, RecipeError)
        if not isinstance(target, type):
            assert list(entry.settings) == list(settings), needed
        assert entry.first == (target.__doc__ or "").strip().splitlines()[0]


def test_recipes_and_engines_are_listed() -> None:
    assert [entry.name for entry in catalogues.entries("recipes")] == list(recipe.names())
    assert [entry.name for entry in catalogues.entries("engines")] == sorted(ENGINES)
    assert all(entry.first for entry in catalogues.entries("recipes") + catalogues.entries("engines"))


def test_a_method_with_memory_shows_its_fields_and_not_its_memory() -> None:
    (found,) = catalogues.find("shapers.moving_baseline")
    assert set(found.settings) == {"decay", "initial"}


def test_a_line_each_and_cut_where_the_terminal_ends() -> None:
    lines = list(catalogues.listed())
    assert sum(line.startswith("  ") for line in lines) == sum(map(len, map(catalogues.entries, catalogues.PLACES)))
    assert any(line.startswith("  clip(low=0.2, high=0.2, dual=None)  The clipped surrogate") for line in lines)
    assert max(map(len, catalogues.listed(columns=60))) <= 60
    assert next(catalogues.listed(["ratios"])) == "ratios  (learner/ratios)"


def test_nothing_that_is_listed_is_imported() -> None:
    code = (
        "import sys; from millrace.cluster.cli import main; main(['list']); main(['show', 'surrogates.clip'])\n"
        "print(sorted({'torch', 'ray', 'transformers', 'vllm', 'tensorboard', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert "Source: Proximal Policy Optimization" in done.stdout


def test_what_is_not_there_is_said_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no catalogue 'surogates'; did you mean 'surrogates'\?"):
        catalogues.entries("surogates")
    with pytest.raises(ConfigError, match=r"no recipe and no method 'grpoo'; did you mean 'grpo'\?"):
        catalogues.find("grpoo")
    assert [entry.catalogue for entry in catalogues.find("grpo")] == ["recipes", "advantages"]


def test_a_recipe_is_shown_with_its_numbers_and_what_a_run_must_supply(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "# Mine: a paper of mine (Doe 2026),\n# and more.\n"
        'rewards = { verifier = { name = "exact", strip = false }, filters = "zero_variance" }\n'
        "updates = { epochs = 2, minibatches = 4 }\n"
        '[objective]\nsurrogate = { name = "clip", high = 0.28 }\npenalties = [{ name = "k3", coefficient = 0.04 }]\n'
    )
    lines = described(str(path), path.read_text()).splitlines()
    assert lines[:3] == [str(path), "  Mine: a paper of mine (Doe 2026),", "  and more."]
    told = {line[:10].strip(): line[11:] for line in lines[4:]}
    assert "clip(low=0.2, high=0.28, dual=None)" in told["loss"]
    assert "k3(coefficient=0.04)" in told["loss"]
    assert told["verifier"] == "exact(strip=False)"
    assert told["filters"] == "zero_variance"
    assert told["updates"] == "2 passes over a batch, 4 optimiser steps a pass"
    assert told["models"] == "the policy and a reference model"


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_can_be_shown(name: str) -> None:
    entry = catalogues.find(name)[0]
    assert "\nmodels     the policy" in described(name, entry.text)
