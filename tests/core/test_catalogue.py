"""core/catalogue.py: specs, words, settings, memory, and what each mistake says."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.core import catalogue
from millrace.core.errors import RecipeError, RewardError

WORDS = ("ratio_N", "advantage_N", "reward_G")

FOLDER = '''
"""A catalogue."""
from dataclasses import dataclass, field
from typing import Annotated, Literal
from pydantic import NonNegativeFloat

__all__ = ["clip", "plain", "mean", "odd", "stray", "needy", "loose", "Closed"]


def clip(ratio_N, advantage_N, *, low: NonNegativeFloat = 0.2, high: NonNegativeFloat = 0.2):
    return ratio_N, advantage_N, low, high


def plain(reward_G, ratio_N=None):
    return reward_G, ratio_N


def needy(reward_G, *, length: int, sides: tuple[float, ...] = (), kind: Literal["a", "b"] = "a", untyped=1.0):
    return length, sides, kind, untyped


@dataclass
class mean:
    decay: float = 0.9
    value: float = field(default=0.0, init=False)
    seen: list[float] = field(default_factory=list, init=False)

    def __call__(self, reward_G):
        self.value = self.decay * self.value + reward_G
        self.seen.append(reward_G)
        return self.value


def odd(reward_g):
    return reward_g


def stray(reward_G, tolerance=0.1):
    return reward_G


def loose(reward_G, **rest):
    return reward_G


class Closed:
    def __call__(self, reward_G):
        return reward_G
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"catalogue_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FOLDER)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def resolve(spec: catalogue.Spec, folder: str | None = None, **more: Any) -> catalogue.Method:
    return catalogue.resolve(spec, folder=folder, words=more.pop("words", WORDS), slot="surrogate", **more)


def refusal(spec: catalogue.Spec, folder: str | None = None, **more: Any) -> str:
    with pytest.raises(more.get("error", RecipeError)) as caught:
        resolve(spec, folder, **more)
    return str(caught.value)


def test_a_name_and_a_table_resolve_against_a_folder(folder: str) -> None:
    have = {"advantage_N": 2, "ratio_N": 1, "reward_G": 9}
    assert resolve("clip", folder).call(have) == (1, 2, 0.2, 0.2)
    method = resolve({"name": "clip", "low": 0.1}, folder)
    assert method.call(have) == (1, 2, 0.1, 0.2)
    assert method.name == f"{folder}.clip"
    assert method.needs == ("ratio_N", "advantage_N")
    assert method.settings == {"low": 0.1, "high": 0.2}
    assert not method.is_async


def test_an_optional_word_is_filled_in_when_it_is_there(folder: str) -> None:
    method = resolve("plain", folder)
    assert method.needs == ("reward_G",) and dict(method.optional) == {"ratio_N": None}
    assert method.words == {"reward_G", "ratio_N"}
    assert method.call({"reward_G": 1}) == (1, None)
    assert method.call({"reward_G": 1, "ratio_N": 2}) == (1, 2)


def test_a_missing_word_is_named(folder: str) -> None:
    with pytest.raises(RecipeError, match="clip asks for advantage_N, which is not here; given: ratio_N"):
        resolve("clip", folder).call({"ratio_N": 1})


def test_settings_are_coerced_as_toml_writes_them(folder: str) -> None:
    method = resolve({"name": "needy", "length": 3, "sides": [1, 2.5], "kind": "b", "untyped": 2}, folder)
    assert method.call({"reward_G": 0}) == (3, (1.0, 2.5), "b", 2.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "clip", "hi": 1.0}, "clip has no parameter 'hi'; did you mean 'high'? It takes low=0.2, high=0.2"),
        ({"name": "clip", "x": 1.0}, "clip has no parameter 'x'. It takes low=0.2, high=0.2"),
        ({"name": "plain", "x": 1}, "plain has no parameter 'x'. It takes no parameters"),
        ({"name": "clip", "low": "0.2"}, "clip: low = '0.2': input should be a valid number"),
        ({"name": "clip", "low": True}, "clip: low = True: input should be a valid number"),
        ({"name": "clip", "low": -1}, "clip: low = -1: input should be greater than or equal to 0"),
        ({"name": "needy", "length": 2.5}, "needy: length = 2.5: input should be a valid integer"),
        ({"name": "needy", "length": 1, "kind": "c"}, "needy: kind = 'c': input should be 'a' or 'b'"),
        ({"name": "needy", "length": 1, "untyped": "x"}, "needy: untyped = 'x': input should be a valid number"),
        ("needy", "needy needs parameter 'length'. It takes length, sides=(), kind='a', untyped=1.0"),
        ({"name": "mean", "dekay": 1.0}, "mean has no parameter 'dekay'; did you mean 'decay'? It takes decay=0.9"),
        ({"name": "mean", "value": 1.0}, "mean has no parameter 'value'. It takes decay=0.9"),
        ("odd", "odd asks for 'reward_g'; did you mean 'reward_G'? A surrogate may ask for advantage_N, ratio_N,"),
        ("stray", "stray asks for 'tolerance'. A surrogate may ask for advantage_N, ratio_N, reward_G."),
        ("stray", "To let a recipe set it, put it after a bare *."),
        ("loose", "loose takes **rest: name each word it asks for"),
        ("Closed", "Closed is a class: a method with memory is a dataclass with __call__"),
        ("clop", "unknown surrogate 'clop'; did you mean 'clip'?"),
        ("clop", "your own is written"),
        ("mine.py", "surrogate 'mine.py': say which function of the file, \"mine.py:function\""),
        ({"low": 1}, "surrogate = {'low': 1}: write \"name\", or { name = "),
        (3, "surrogate = 3: write"),
        ("math:pi", "surrogate math:pi is a float, not a function"),
        ("math:", "surrogate 'math:': write \"package.module:function\""),
    ],
)
def test_a_mistake_says_what_to_write(folder: str, spec: Any, message: str) -> None:
    assert message in refusal(spec, folder)


def test_memory_goes_out_and_comes_back(folder: str) -> None:
    first, second = (resolve({"name": "mean", "decay": 0.5}, folder) for _ in range(2))
    first.call({"reward_G": 1.0})
    saved = catalogue.memory(first)
    assert saved == {"value": 1.0, "seen": [1.0]}
    first.call({"reward_G": 1.0})
    assert saved == {"value": 1.0, "seen": [1.0]}, "what was saved is a copy"
    assert catalogue.memory(second) == {"value": 0.0, "seen": []}, "every resolution has a memory of its own"
    catalogue.restore(second, saved)
    assert second.call({"reward_G": 0.0}) == 0.5
    assert catalogue.memory(resolve("clip", folder)) == {}
    with pytest.raises(RecipeError, match="remembers value, seen, but the checkpoint holds ema for it"):
        catalogue.restore(first, {"ema": 1.0})


def test_a_file_is_loaded_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "neighbour.py").write_text("BONUS = 10\n")
    source = tmp_path / "own.py"
    source.write_text("import neighbour\ndef score(reward_G): return reward_G + neighbour.BONUS\n")
    monkeypatch.chdir(tmp_path)
    method = resolve("own.py:score", words=("reward_G",))
    assert method.name == "own.py:score" and method.call({"reward_G": 1}) == 11
    again = resolve(f"{source}:score")
    assert again.function is method.function, "one file is one module, however it is named"
    source.write_text("def score(reward_G): return -reward_G\n")
    assert resolve("own.py:score").call({"reward_G": 1}) == -1, "an edited file is a new module"


def test_a_files_module_name_is_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(reward_G): return reward_G\n")
    here = resolve(f"{tmp_path}/own.py:score").function.__module__
    code = (
        "from millrace.core import catalogue; "
        f"m = catalogue.resolve('{tmp_path}/own.py:score', folder=None, words=['reward_G'], slot='verifier'); "
        "print(m.function.__module__)"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert there.stdout.strip() == here


def test_an_async_function_is_known_as_such(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\n"
        "async def score(reward_G): return reward_G\n"
        "@dataclass\nclass Judge:\n    scale: float = 2.0\n"
        "    async def __call__(self, reward_G): return self.scale * reward_G\n"
    )
    plain, judge = resolve(f"{tmp_path}/own.py:score"), resolve({"name": f"{tmp_path}/own.py:Judge", "scale": 3})
    assert plain.is_async and judge.is_async
    assert asyncio.run(judge.call({"reward_G": 2.0})) == 6.0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import millrace_absent\n", "own.py:1: ModuleNotFoundError: No module named 'millrace_absent'"),
        ("x = 1\n\ny = x +\n", "own.py:3: SyntaxError: invalid syntax"),
        ("x = 1\ny = 1 / 0\n", "own.py:2: ZeroDivisionError: division by zero"),
        ("import json\nx = json.loads('[')\n", "own.py:2: JSONDecodeError"),
        ("import sys\nsys.exit(3)\n", "own.py:score' cannot be imported: it calls sys.exit(3)"),
        ("def scor(reward_G): pass\n", "own.py has no 'score'; did you mean 'scor'? It has scor"),
    ],
)
def test_a_file_that_does_not_import_names_file_line_and_cause(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "own.py").write_text(source)
    assert message in refusal(f"{tmp_path}/own.py:score", error=RewardError)
    assert message in refusal(f"{tmp_path}/own.py:score", error=RewardError), "the second time too"


def test_what_is_not_there_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"there is no file {tmp_path}/own.py; relative paths start at {tmp_path}" in refusal("own.py:score")
    assert "there is no module 'absent_package' to import. Put its folder on PYTHONPATH" in refusal(
        "absent_package.m:f"
    )
    (tmp_path / "present_module.py").write_text("import absent_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = refusal("present_module:f")
    assert "present_module.py:1: ModuleNotFoundError: No module named 'absent_package'" in message
    assert "unknown surrogate 'exact': your own is written" in refusal("exact")


def test_names_are_those_of_all(folder: str) -> None:
    assert catalogue.names(folder)[:3] == ("clip", "plain", "mean")


def test_a_word_behind_the_star_is_told_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def mine(ratio_N, *, reward_G):\n    return reward_G\n")
    said = refusal(f"{tmp_path}/mine.py:mine")
    assert said.endswith(
        "needs parameter 'reward_G'. It takes reward_G. To have the word 'reward_G' filled in, put it before the *"
    )


def test_a_word_that_is_known_twice_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def mine(anwser):\n    return 0\n")
    said = refusal(f"{tmp_path}/mine.py:mine", words=("text", "answer", "answer"))
    assert said.endswith("did you mean 'answer'? A surrogate may ask for answer, text.")
