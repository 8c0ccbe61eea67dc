"""What the pages say of the repository is there: links, anchors, paths, keys, names, make targets, tables."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster import catalogues
from millrace.cluster.config import RunConfig
from millrace.cluster.trackers.kinds import KINDS
from millrace.core import recipe
from millrace.core.catalogue import split
from millrace.core.config import Config
from millrace.core.replay.draws import State
from millrace.learner.objective import Objective
from millrace.rewards.shaping import Shaping

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted(DOCS.glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
TOP = "actors|benchmarks|cluster|core|docs|examples|learner|recipes|requirements|rewards|tests"
LONGEST = 140  # lines of a page


@cache
def prose(page: Path) -> str:
    """A page without its code blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE)


def spans(page: Path) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "mailto:")):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists():
            yield f"{page.name}: {target}: there is no {file}"
        elif anchor and anchor not in anchors(file):
            yield f"{page.name}: {target}: {file.name} has no heading #{anchor}"


def missing_paths(page: Path) -> Iterator[str]:
    """Paths in backticks that begin with a folder of ours."""
    for span in spans(page):
        if not re.fullmatch(rf"(?:{TOP})/[\w./*-]*", span) or "NAME" in span:
            continue
        if not list(ROOT.glob(span.rstrip("/"))):
            yield f"{page.name}: there is no {span}"


def unknown_keys(page: Path) -> Iterator[str]:
    """Keys of the configuration in backticks: `loop.max_lag`, also with a value behind."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    for span in spans(page):
        found = re.match(r"(\w+)\.([a-z_]+)(?:$|[ .])", span)
        if found is None or not is_config(section := sections.get(found[1])):
            continue
        known = (
            recipe.Rewards.model_fields.keys() | section.model_fields if found[1] == "rewards" else section.model_fields
        )
        if found[2] not in known:
            yield f"{page.name}: {span}: [{found[1]}] has no key {found[2]}"


def is_config(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Config)


def rows(page: Path) -> list[list[str]]:
    """The cells of every table row."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def ticked(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out


def test_the_pages_build_without_a_warning(site: Path) -> None:
    assert {path.stem for path in DOCS.glob("*.md")} <= {path.stem for path in site.glob("*.html")}


def test_a_built_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    fetched = re.compile(
        r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//|<link[^>]+href=\"(?:https?:)?//|@import|url\(['\"]?(?:https?:)?//"
    )
    found = [f"{page.name}: {hit[0]}" for page in site.glob("*.html") for hit in fetched.finditer(page.read_text())]
    found += [f"{page.name}: {hit[0]}" for page in site.glob("css/*.css") for hit in fetched.finditer(page.read_text())]
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_exists(page: Path) -> None:
    assert list(chain(broken_links(page), missing_paths(page), unknown_keys(page))) == []


def test_pages_are_short() -> None:
    assert [page.name for page in DOCS.glob("*.md") if page.read_text().count("\n") > LONGEST] == []


def test_every_page_is_reached_from_the_index() -> None:
    linked = set(re.findall(r"\]\((\w+\.md)", (DOCS / "index.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"index.md"}


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"`make ([\w-]+)`", page.read_text())}
    assert named - targets == set()


def test_the_table_of_methods_is_that_of_the_recipes() -> None:
    """Every recipe has a row, which names all of its methods and its paper."""
    found = {
        ticked(cells[1]).pop(): cells for cells in rows(DOCS / "methods.md") if len(cells) == 4 and "arxiv" in cells[3]
    }
    assert set(found) == set(recipe.names())
    for name, (_, _, slots, source) in found.items():
        assert ticked(slots) == methods(recipe.load(name)), name
        text = (ROOT / "recipes" / f"{name}.toml").read_text()
        assert set(re.findall(r"\d{4}\.\d{5}", source)) <= set(re.findall(r"arXiv:(\d{4}\.\d{5})", text)), name


def test_the_lines_for_recipes_compose() -> None:
    """Each changes the recipe `grpo`, but for whole losses, which stand for themselves."""
    lines = [found[0] for cells in rows(DOCS / "methods.md") if (found := re.findall(r"`(\S+ = [^`]+)`", cells[1]))]
    assert len(lines) >= 5
    for line in lines:
        table = tomllib.loads(line)
        whole = "name" in table.get("objective", {})
        loaded = recipe.load(table if whole else {"name": "grpo", **table})
        Objective.of(loaded.objective, models=frozenset({"reference"}))
        Shaping.of(loaded.rewards)


def methods(loaded: recipe.Recipe) -> set[str]:
    """All that a recipe names, its verifier aside."""
    said = [getattr(loaded.objective, slot) for slot in loaded.objective.model_fields_set]
    said += [loaded.rewards.shapers, loaded.rewards.filters]
    specs = chain.from_iterable([each] if isinstance(each, str | dict) else each for each in said if each is not None)
    return {split(spec, slot="slot")[0] for spec in specs}


def test_the_tables_of_slots_and_places_are_complete() -> None:
    slots = {name for cells in rows(DOCS / "recipes.md") for name in ticked(cells[0])}
    assert slots >= set(recipe.ObjectiveConfig.model_fields) - {"loss"}
    places = {path.rstrip("/") for cells in rows(DOCS / "where.md") for path in chain(*map(ticked, cells))}
    # Readers and generated tasks have rows of their own.
    wanted = {place for name, place in catalogues.PLACES.items() if name != "datasets"}
    assert wanted <= places


def test_states_and_trackers_are_complete() -> None:
    states = {name for cells in rows(DOCS / "loop.md") for name in ticked(cells[0])}
    assert states >= {state.value for state in State}
    settings = {
        ticked(cells[0]).pop(): ticked(cells[1])
        for cells in rows(DOCS / "watching.md")
        if len(cells) == 3 and ticked(cells[0])
    }
    assert settings == {name: set(kind.settings.model_fields) for name, kind in KINDS.items()}


def test_the_run_directory_is_described_whole(workplace: Path) -> None:
    said = {name.rstrip("/") for cells in rows(DOCS / "run_directory.md") for name in ticked(cells[0])}
    there = {path.name for path in (workplace / "runs" / "run").iterdir()}
    not_always = {"report.html", "progress.log", "driver.log", "trackers", "wandb", "stop", "ledger.sqlite-wal"}
    assert there - said == set() and said - there <= not_always


@pytest.mark.parametrize("section", ["supervise", "journal"])
def test_the_settings_of_reliability_are_complete_and_their_defaults_right(section: str) -> None:
    text = (DOCS / "reliability.md").read_text()
    table = text.split(f"| setting of `[{section}]` |")[1].split("\n\n")[0]
    said = {}
    for line in table.splitlines()[2:]:
        names, defaults, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        said |= dict(zip(re.findall(r"`(\w+)`", names), defaults.split(", "), strict=True))
    kind = RunConfig.model_fields[section].annotation
    assert is_config(kind)
    assert {name: shown(field.default) for name, field in kind.model_fields.items()} == said  # type: ignore[union-attr]


def shown(default: Any) -> str:
    """A default as the tables have it."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, str):
        return f'`"{default}"`'
    return f"{default >> 20} MiB" if default >= 1 << 20 else f"{default:g}"


def test_every_number_of_a_step_is_explained(workplace: Path) -> None:
    first = (workplace / "runs" / "run" / "metrics.jsonl").read_text().splitlines()[0]
    text = (DOCS / "watching.md").read_text()
    names = {re.sub(r"^lag_\d+", "lag_L", name) for name in re.findall(r'"([a-z_0-9]+/[^"]+)":', first)}
    families = {"objective": "`objective/...`", "waste": "`waste/...`"}
    missing = [
        name
        for name in sorted(names)
        if (families.get(name.partition("/")[0]) or f"`{name}`") not in text
        and not (name.startswith("time/") and f"`{name.removeprefix('time/')}`" in text)
    ]
    assert missing == []


def test_the_checks_find_what_is_planted(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[a](b.md) [c](#d) [e](page.md#a-page) `core/nothing.py` `loop.max_lagg` `rewards.shapers`\n"
    )
    assert len(list(broken_links(page))) == 2
    assert list(missing_paths(page)) == ["page.md: there is no core/nothing.py"]
    assert list(unknown_keys(page)) == ["page.md: loop.max_lagg: [loop] has no key max_lagg"]
