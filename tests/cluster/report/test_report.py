"""A run directory becomes one page, whatever state the run is in; what is not there is said."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster import jobs, run_directory, snapshot
from millrace.cluster.report.build import contents, embedded, page, write
from millrace.cluster.report.read import read
from millrace.cluster.snapshot import Status
from millrace.core.errors import ConfigError


@pytest.fixture(scope="module")
def finished(make_run_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = make_run_in(tmp_path_factory.mktemp("report"), loop={"steps": 6})
    jobs.train(config, local=True, say=lambda line: None)
    directory: Path = config.directory
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to break, without the weights."""
    return Path(
        shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("model", "weights", "check*"))
    )


def values(text: str) -> Any:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def facts(of: Any) -> dict[str, str]:
    return dict(of["facts"])


def test_a_finished_run(finished: Path) -> None:
    out = write(finished)
    assert out == finished / "report.html" and not list(finished.glob("*.partial"))
    shown = values(out.read_text())
    assert (shown["name"], shown["state"], shown["tone"], shown["error"], shown["missing"]) == (
        "run", "finished", "good", "", [],
    )  # fmt: skip
    tiles = {tile["label"]: tile for tile in shown["tiles"]}
    result = json.loads((finished / "result.json").read_text())
    assert tiles["steps"]["value"] == "6 of 6"
    assert tiles["reward"]["first"] == f"{result['reward']['first']:.3f}"
    assert tiles["held-out"]["value"] == f"{result['held_out']['last']['mean']:.3f}"
    assert facts(shown)["Formula"].startswith(
        "sequence_mean of [truncated_importance(cap=2.0) x clip(low=0.2, high=0.2"
    )
    assert facts(shown)["Verifier"] == "exact"
    assert f"torch {result['packages']['torch']}" in facts(shown)["Packages"]
    assert {row["name"].replace(" ", "_"): row["tokens"] for row in shown["waste"]} == result["waste"]
    assert shown["events"][0]["kind"] == "finished"


def test_its_samples_are_of_every_step_and_belong_to_their_rewards(finished: Path) -> None:
    rollouts = values(write(finished, finished / "other.html").read_text())["rollouts"]
    assert {each["step"] for each in rollouts} == set(range(1, 7)) and len(rollouts) == 24
    for each in rollouts:
        answer = each["prompt"][-1]
        assert each["reward"] == each["verdict"]["score"] == float("".join(each["tokens"]) == f"{answer}<eos>")
        assert len(each["tokens"]) == len(each["logprobs"]) == each["length"] == each["versions"][-1][2]
        assert each["lag"] == max(each["lags"]) == each["step"] - 1 - each["versions"][0][0]


def test_a_resumed_run_forgets_the_rollouts_of_lost_steps(make_run: Any) -> None:
    config = make_run(loop={"steps": 4}, learner={"checkpoint_every": 2})
    jobs.train(config, local=True, say=lambda line: None)
    longer = make_run(loop={"steps": 6}, learner={"checkpoint_every": 2})
    with (config.directory / "rollouts.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "group": "lost"}) + "\n")
    jobs.train(longer, local=True, resume=True, say=lambda line: None)
    shown = contents(read(config.directory))
    assert [each["step"] for each in shown["rollouts"]] == sorted(4 * [1, 2, 3, 4, 5, 6])
    assert "lost" not in {each["group"] for each in shown["rollouts"]}
    assert "resumed" in {event["kind"] for event in shown["events"]}


def test_a_run_under_way(run: Path) -> None:
    for name in ("result.json", "status.json", "rollouts.jsonl"):
        (run / name).unlink()
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(rows[:3]) + '\n{"step": 4, "tor')
    (run / "events.jsonl").write_text('{"time_s": 1.0, "kind": "started", "step": 0}\n')
    shown = values(write(run).read_text())
    assert (shown["state"], shown["tone"]) == ("running", "busy")
    said = " ".join(shown["missing"])
    for part in ("metrics.jsonl is cut off", "No sample rollouts", "No result.json"):
        assert part in said
    assert {row["name"] for row in shown["waste"]} >= {"generated", "trained", "unaccounted"}, "of the last row"
    assert "Packages, of this report" in facts(shown)


def test_a_run_before_its_first_step(run: Path) -> None:
    for name in ("result.json", "status.json", "rollouts.jsonl", "metrics.jsonl", "events.jsonl"):
        (run / name).unlink()
    shown = values(write(run).read_text())
    assert shown["charts"] == [] and shown["rollouts"] == [] and shown["waste"] == []
    assert any("No step has been made yet" in text for text in shown["missing"])


def test_a_failed_run_says_why(run: Path) -> None:
    (run / "status.json").unlink()
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time_s": 1.0, "kind": "resumed"}\n{"time_s": 2.0, "kind": "failed", "cause": "engine: gone"}\n')
    shown = values(write(run).read_text())
    assert (shown["state"], shown["tone"], shown["error"]) == ("failed", "bad", "engine: gone")
    assert any("earlier incarnation" in text for text in shown["missing"]), "result.json is not of this one"
    assert "Last checkpoint" not in facts(shown)


def test_a_run_whose_driver_was_killed_has_failed(run: Path) -> None:
    snapshot.write(run, Status(id=str(run), state="running", step=3, steps=6))
    with run_directory.held(run):
        assert read(run).state == "running"
    found = read(run)
    assert found.state == "failed" and found.error.startswith("DriverLost: the driver, process")


def test_incidents_stand_at_their_steps(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "held_out" not in row]
    for row in rows:
        row["time_s"] = 100.0 + 10 * row["step"]
    for row in steps:
        row["time/step_s"] = 10.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = [
        {"time_s": 105.0, "kind": "lost", "component": "generation-0", "cause": "signal\n9"},
        {"time_s": 125.0, "kind": "serving", "component": "generation-0", "down_s": 20.0},
        {"time_s": 155.0, "kind": "lost", "component": "generation-0", "cause": "signal 9"},
        {"time_s": 156.0, "kind": "serving", "component": "generation-0", "down_s": 1.0},
        {"time_s": 500.0, "kind": "given up", "component": "held-out"},
        {"time_s": 600.0, "kind": "lost", "component": "held-out", "cause": "gone"},
        {"time_s": 601.0, "kind": "given up", "component": "held-out", "cause": "gone"},
        {"time_s": 130.0, "kind": "quarantined", "prompt": "p7", "cause": "crashed", "times": 3, "traceback": "Tr\nE"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in told))
    shown = values(write(run).read_text())["incidents"]
    assert shown["steps"] == 6
    assert [(each["component"], each["step"], each["back"], each["down"]) for each in shown["lost"]] == [
        ("generation-0", 0.5, 2.5, "20.0 s"),
        ("generation-0", 5.5, pytest.approx(5.6), "1.0 s"),
        ("held-out", 6, None, "given up"),
    ]
    assert shown["roles"] == [
        {"role": "generation", "lost": 2, "mean": "10.5 s", "most": "20.0 s"},
        {"role": "held-out", "lost": 1, "mean": "", "most": ""},
    ]
    assert shown["quarantined"] == [{"prompt": "p7", "cause": "crashed", "times": 3, "traceback": "Tr\nE"}]


def test_a_run_without_incidents_has_none(finished: Path) -> None:
    shown = contents(read(finished))["incidents"]
    assert shown["lost"] == [] and shown["roles"] == [] and shown["quarantined"] == []
    assert next(row for row in contents(read(finished))["waste"] if row["name"] == "unaccounted")["tokens"] == 0


def test_a_supervised_run_has_losses(make_run: Any) -> None:
    config = make_run(recipe="sft", supervised={"epochs": 1, "batch_rows": 20})
    jobs.train(config, local=True, say=lambda line: None)
    shown = values(write(config.directory).read_text())
    assert [chart["id"] for chart in shown["charts"]] == ["loss", "gradient"]
    assert shown["missing"] == ["A supervised run: it generates and judges nothing, so there are losses only."]
    assert {tile["label"] for tile in shown["tiles"]} == {"steps", "duration", "loss"}
    assert shown["state"] == "finished"


def test_what_another_release_wrote_is_shown_as_far_as_it_goes(run: Path) -> None:
    (run / "config.toml").write_text('name = "old"\nknob = 1\n[recipe]\norigin = "grpo"\n')
    with (run / "metrics.jsonl").open("a") as file:
        file.write("not json\n")
    shown = values(write(run).read_text())
    assert shown["name"] == "old" and facts(shown)["Recipe"] == "grpo" and "Formula" not in facts(shown)
    assert any("This release refuses config.toml" in text for text in shown["missing"])
    assert "1 lines of metrics.jsonl cannot be read and are left out." in shown["missing"]


def test_a_directory_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run directory, it has no config\.toml"):
        write(tmp_path)


def test_texts_cannot_end_the_script_they_stand_in() -> None:
    hostile = {"prompt": "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \u2028 \ud800 {{style}}"}
    assert "<" not in embedded(hostile) and json.loads(embedded(hostile)) == hostile


def test_the_page_is_one_file_that_names_no_other(finished: Path) -> None:
    shown = contents(read(finished)) | {"name": "</title><script>alert(1)</script>{{data}}"}
    text = page(shown)
    assert text.count("<script") == 2 and text.count("</script>") == 2 and text.count("</title>") == 1
    assert "{{data}}" in text, "a text is no place of the template"
    assert values(text)["name"] == shown["name"]
    code = text.replace(embedded(shown), "").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(
        r"https?:|src=|@import|url\(|innerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(", code
    )
    assert re.search(r"default-src 'none'; script-src 'sha256-[\w+/]{43}='; style-src 'sha256-[\w+/]{43}='", text)


COLOURS = re.compile(r"--(\w+): (#[0-9a-f]{6})")


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_legible_and_ordered_ones_differ_in_lightness(theme: str) -> None:
    css = (Path(jobs.__file__).parent / "report" / "page.css").read_text()
    light, dark = css.split("@media (prefers-color-scheme: dark)")[:2]
    of = dict(COLOURS.findall(light if theme == "light" else dark))
    for text, back in (("text", "card"), ("text", "page"), ("soft", "card"), ("soft", "page"), ("accent", "card")):
        assert contrast(of[text], of[back]) >= 4.5, (text, back)
    for state in ("good", "bad", "busy", "idle"):
        assert contrast(of[state], re.search(rf"--{state}-back: (#\w+)", light if theme == "light" else dark)[1]) >= 4.5  # type: ignore[index]
    lines = [f"{kind}{at}" for kind, many in (("c", 8), ("s", 6)) for at in range(many)]
    assert {
        name: round(contrast(of[name], of["card"]), 1) for name in lines if contrast(of[name], of["card"]) < 3
    } == {}
    ordered = [luminance(of[f"s{at}"]) for at in range(6)]
    assert ordered == sorted(ordered, reverse=True)
