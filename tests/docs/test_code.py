"""Every code block of the pages is what it says it is: Python runs, TOML is a run or a recipe, commands are commands.

A comment above a block says more of it, `<!-- run, file: own.toml -->`:

    run, recipe     which of the two a toml block is; each must say it
    file: NAME      the block is also written into the page's directory; such a python block is not run
    output          a text block: what the python block before it printed

`<!-- setup ... -->` holds Python of its own. The blocks of a page run from top to bottom, in one namespace, in a copy
of the directory of tests/docs/conftest.py; pages that ask for `runs/run` find it there.
"""

import contextlib
import io
import re
import shlex
import shutil
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster import cli, config
from millrace.core import recipe
from millrace.core.recipe import ObjectiveConfig, Rewards
from millrace.learner.objective import Objective
from millrace.rewards.judge import verifier
from millrace.rewards.shaping import Shaping

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
# A page that submits a job starts its process.
MARKED = [pytest.param(page, marks=pytest.mark.ray if page.stem == "jobs" else (), id=page.stem) for page in PAGES]
BLOCK = re.compile(
    r"(?:^<!--(?P<mark>(?:(?!-->).)*)-->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = {"python", "toml", "console", "text", "json", "setup"}
# What a block of a run may leave out: a page shows the keys that it speaks of.
LEFT_OUT = {"model": "model", "data": {"train": "train.jsonl"}}
LOOP = {"steps": 10, "groups_per_step": 16, "group_size": 8}


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    text: str
    marks: Mapping[str, str]
    line: int


def blocks(page: str) -> Iterator[Block]:
    for found in BLOCK.finditer(page):
        line = page.count("\n", 0, found.start()) + 1
        if found["setup"] is not None:
            yield Block("setup", found["setup"], {}, line)
            continue
        said = [mark.strip().partition(":") for mark in (found["mark"] or "").split(",")]
        yield Block(found["language"], found["text"], {name: value.strip() for name, _, value in said if name}, line)


class Reader:
    """Follows one page from top to bottom, in the working directory."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "page"}
        self.printed = ""

    def follow(self, block: Block) -> None:
        assert block.language in LANGUAGES, f"a block is of one of {', '.join(sorted(LANGUAGES))}"
        assert set(block.marks) <= {"run", "recipe", "file", "output"}, f"marks {block.marks}"
        if "file" in block.marks:
            Path(block.marks["file"]).write_text(block.text)
        if block.language in ("python", "setup") and "file" not in block.marks:
            self.printed = self._run(block.text)
        elif block.language == "toml":
            assert ("run" in block.marks) != ("recipe" in block.marks), "a toml block is marked as run or as recipe"
            (check_run if "run" in block.marks else check_recipe)(tomllib.loads(block.text))
        elif block.language == "console":
            check_commands(block.text)
        elif "output" in block.marks:
            assert self.printed == block.text

    def _run(self, text: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(text, "block", "exec"), self.namespace)
        return out.getvalue()


def check_run(table: dict[str, Any]) -> None:
    """It is one, and what it names exists."""
    loop = {**LOOP, **table.get("loop", {})}
    found = config.of({**LEFT_OUT, **table, "loop": loop}, root=Path.cwd(), source="block")
    check_methods(found.recipe.objective, found.judging)


def check_recipe(table: dict[str, Any]) -> None:
    found = recipe.load(table)
    check_methods(found.objective, found.rewards)


def check_methods(objective: ObjectiveConfig, rewards: Rewards) -> None:
    Objective.of(objective, models=frozenset({"reference"}))
    Shaping.of(rewards)
    if rewards.verifier is not None:
        verifier(rewards.verifier, columns=("numbers", "target"))


def check_commands(text: str) -> None:
    """Ours parse, with their settings; `list` and `show` also run."""
    for line in text.splitlines():
        if not line.startswith(("$ millrace ", "$ python -m millrace ")):
            continue
        words = shlex.split(line.partition("millrace ")[2], comments=True)
        given, others = cli.parser().parse_known_args(words)
        assert not [word for word in others if word.startswith("-")], line
        settings = [cli.setting(each) for each in [*getattr(given, "settings", []), *others]]
        if given.command in ("list", "show"):
            with contextlib.redirect_stdout(io.StringIO()):
                cli.main(words)
        elif settings:
            found = config.load(given.run if Path(given.run).is_file() else "run.toml", settings=settings)
            check_methods(found.recipe.objective, found.judging)


@pytest.mark.parametrize("page", MARKED)
def test_a_page_does_what_it_says(page: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text()
    ignored = None if "runs/run" in text else shutil.ignore_patterns("runs")
    shutil.copytree(workplace, tmp_path / "page", ignore=ignored)
    monkeypatch.chdir(tmp_path / "page")
    reader = Reader()
    for block in blocks(text):
        try:
            reader.follow(block)
        except (Exception, SystemExit) as caught:
            raise AssertionError(f"{page.relative_to(ROOT)}:{block.line}: {caught}") from caught


def test_the_readme_shows_commands_runs_and_recipes_that_exist(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks are indented and carry no marks: they are told apart by what is in them."""
    monkeypatch.chdir(workplace)
    seen = set()
    for found in re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", (ROOT / "README.md").read_text(), re.MULTILINE):
        text = textwrap.dedent(found)
        commands = re.findall(r"^millrace .*$", text, re.MULTILINE)
        if commands:
            check_commands("\n".join(f"$ {line}" for line in commands))
            seen.add("commands")
        elif "model =" in text:
            config.of(tomllib.loads(text), root=workplace, source="README.md")
            seen.add("run")
        elif "[objective]" in text:
            check_recipe(tomllib.loads(text.partition("\n\n")[0]))
            seen.add("recipe")
    assert seen == {"commands", "run", "recipe"}


def test_every_fence_is_a_block() -> None:
    for page in PAGES:
        text = page.read_text()
        fenced = sum(each.language != "setup" for each in blocks(text))
        assert 2 * fenced == len(re.findall(r"^\s*```", text, re.MULTILINE)), page


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        ("```python\nassert 1 == 2, 'no'\n```\n", "no"),
        ("<!-- run -->\n```toml\nloop = { stepz = 3 }\n```\n", "unknown key 'stepz'"),
        ('<!-- run -->\n```toml\nrewards.verifier = "exakt"\n```\n', "did you mean 'exact'"),
        ('<!-- recipe -->\n```toml\nobjective = { surrogate = "clap" }\n```\n', "did you mean 'clip'"),
        ("```toml\nseed = 1\n```\n", "marked as run or as recipe"),
        ("```console\n$ millrace trian run.toml\n```\n", "2"),
        ("```console\n$ millrace show grpoo\n```\n", "2"),
        ("```console\n$ millrace train run.toml loop.stepz=3\n```\n", "unknown key 'stepz'"),
        ("```python\nprint(1)\n```\n\n<!-- output -->\n```text\n2\n```\n", "1"),
    ],
)
def test_the_check_finds_what_is_planted(
    planted: str, message: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    reader = Reader()
    with pytest.raises((Exception, SystemExit), match=re.escape(message)):
        for block in blocks(planted):
            reader.follow(block)
