"""A report of a real run with further rollouts of known numbers, in headless Chromium."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster import config, jobs
from millrace.cluster.report.build import write

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SYNTHETIC = 2000  # further rollouts
HOSTILE = "</script><script>window.taken=1</script><img src=x onerror='window.taken=2'>\u202etxt.exe<b>bold</b>"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and its chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def run(digit_model: Path, copy_task: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: a real run of 12 steps, and known rollouts of later ones."""
    root = tmp_path_factory.mktemp("browser")
    made = config.of(
        {
            "model": str(digit_model),
            "data": {key: str(path) for key, path in copy_task.items()},
            "recipe": "grpo",
            "loop": {"steps": 12, "groups_per_step": 16, "group_size": 8, "max_lag": 1},
            "sampling": {"max_tokens": 4},
            "rewards": {"verifier": "exact", "poll_s": 0.1, "heartbeat_s": 0.1},
            "generation": {"engine": "table", "slots": 64, "heartbeat_s": 0.1, "linger_s": 0.02},
            "learner": {"learning_rate": 0.5, "threads": 1},
            "evaluation": {"every": 4},
        },
        root=root,
        source="run.toml",
        name="digits",
    )
    jobs.train(made, local=True, say=lambda line: None)
    with (made.directory / "rollouts.jsonl").open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in [known(), *map(synthetic, range(SYNTHETIC)), hostile()])
    return made.directory


@pytest.fixture(scope="session")
def report(run: Path) -> Path:
    return write(run)


def rollout(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "step": 100,
        "group": "draw 7 attempt 0",
        "member": 0,
        "prompt_id": "train:7",
        "prompt": "a prompt",
        "reward": 0.5,
        "advantage": 0.25,
        "lag": 0,
        "finish_reason": "stop",
        "length": 2,
        "cut": None,
        "tokens": ["x", "y"],
        "logprobs": [-0.5, -0.25],
        "given": [],
        "versions": [[99, 0, 2]],
        "lags": [0],
        "verdict": {"kind": "scored", "score": 0.5, "components": {}, "feedback": ""},
    }
    return found | changes


def known() -> dict[str, Any]:
    """Three versions, a part of a character, a given token, and a cut: tokens 5 to 104 are left out."""
    return rollout(
        step=500,
        prompt="the known one",
        reward=7.5,
        lag=3,
        length=107,
        cut=[5, 105],
        tokens=["Hello", ",\n", "", "é", "\u200b", " cut", " end"],
        logprobs=[-0.6931472, -2.302585, -4.0e-5, -12.0, 0.0, -0.1, -1.5],
        given=[4],
        versions=[[41, 0, 2], [42, 2, 104], [43, 104, 107]],
        lags=[3, 2, 1],
        verdict={"kind": "subject_failed", "score": 0.0, "components": {"format": 0.25}, "feedback": "no answer"},
    )


def synthetic(at: int) -> dict[str, Any]:
    """Step 101 + at; rewards 0, 0.1, ... 0.9 and lags 0, 1, 2 in turn; one in 100 says needle."""
    return rollout(
        step=101 + at % 300,
        group=f"draw {at} attempt 0",
        prompt=f"number {at}",
        reward=at % 10 / 10,
        lag=at % 3,
        tokens=["some ", "needle" if at % 100 == 0 else "hay"],
    )


def hostile() -> dict[str, Any]:
    return rollout(
        step=600,
        prompt=HOSTILE,
        prompt_id=HOSTILE,
        tokens=[HOSTILE, "<b>"],
        finish_reason="<i>stop</i>",
        verdict={"kind": "scored", "score": 1.0, "components": {HOSTILE: 1.0}, "feedback": HOSTILE},
    )


@pytest.fixture
def open_page(chromium: Any, report: Path) -> Iterator[Any]:
    """Opens the report, and sees afterwards that it neither complained nor asked anybody for anything."""

    def opened(width: int = 1280, *, theme: str = "light", path: Path = report) -> Any:
        for log in ("browser", "performance"):
            chromium.get_log(log)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        chromium.get(path.as_uri())
        return chromium

    yield opened
    assert [entry["message"] for entry in chromium.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked and {url.partition(":")[0] for url in asked} <= {"file", "data"}, asked
    assert len({url for url in asked if url.startswith("file:")}) == 1, "the page, and nothing beside it"
