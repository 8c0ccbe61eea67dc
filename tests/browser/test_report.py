"""report.html as a reader sees and uses it. Every test also sees that the page logs no error and fetches nothing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from millrace.cluster.report.build import contents, page
from millrace.cluster.report.read import read


def all_of(driver: Any, css: str) -> list[Any]:
    found: list[Any] = driver.find_elements(By.CSS_SELECTOR, css)
    return found


def one(driver: Any, css: str) -> Any:
    (found,) = all_of(driver, css)
    return found


def texts(driver: Any, css: str) -> list[str]:
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)", css
    )
    return found


def column(driver: Any, name: str) -> list[str]:
    return texts(driver, f"tr.row td[data-column={name}]")


def count(driver: Any) -> str:
    return " ".join(texts(driver, ".pager .count"))


def legend(driver: Any, chart: str) -> list[str]:
    return texts(driver, f"#chart-{chart} .legend li")


def number(item: str) -> float:
    """Of an item of a legend."""
    return float(item.removeprefix("training"))


def drawn(driver: Any, chart: str, series: str) -> list[tuple[float, float]]:
    """The points of a line in the units of the axes, read off the picture by its ticks."""
    path, rules, ticks = driver.execute_script(
        """
        const chart = document.getElementById(arguments[0]);
        const path = [...chart.querySelectorAll("[data-series]")].find((each) => each.dataset.series === arguments[1]);
        const texts = [...chart.querySelectorAll("svg[role=img] text")];
        const axes = { end: ["y", "y1"], middle: ["x", "x1"] };
        const marks = (anchor) => texts.filter((each) => each.getAttribute("text-anchor") === anchor)
          .filter((each) => each.textContent !== "step")
          .map((each) => [Number(each.getAttribute(axes[anchor][0])), each.textContent]);
        return [path.getAttribute("d"), marks("end"), marks("middle")];
        """,
        f"chart-{chart}",
        series,
    )

    def scale(marks: list[tuple[float, str]], shift: float) -> Any:
        (at, low), (to, high) = marks[0], marks[-1]
        low_value, high_value = float(low.rstrip("%")), float(high.rstrip("%"))
        return lambda pixel: low_value + (pixel - at + shift) * (high_value - low_value) / (to - at)

    to_y, to_x = scale(rules, 4), scale(ticks, 0)  # the text of a tick stands 4 below its line
    return [(to_x(float(x)), to_y(float(y))) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return read(run).rows  # type: ignore[return-value]


def test_lines_go_through_the_numbers_of_the_run(open_page: Any, run: Path) -> None:
    driver = open_page()
    rows = rows_of(run)
    points = drawn(driver, "reward", "training")
    assert [round(step) for step, _ in points] == [row["step"] for row in rows]
    assert [reward for _, reward in points] == pytest.approx([row["reward/mean"] for row in rows], abs=0.01)
    evaluations = drawn(driver, "reward", "held-out")
    assert [round(step) for step, _ in evaluations] == [0, 4, 8, 12]
    assert len(all_of(driver, "#chart-reward svg[role=img] circle.c1")) == 4


def test_bars_stand_on_each_other_and_cover_their_steps(open_page: Any, run: Path, tmp_path: Path) -> None:
    shares = {"a": [0.25, 0.5, 0.0], "b": [0.75, 0.25, 1.0], "c": [0.0, 0.25, 0.0]}
    series = [
        {"name": name, "colour": f"s{at}", "style": "line", "x": [2, 4, 10], "y": y}
        for at, (name, y) in enumerate(shares.items())
    ]
    head = {"title": "t", "about": "", "unit": "", "stack": True, "log": False, "percent": True, "zero": True}
    path = tmp_path / "bars.html"
    path.write_text(page(contents(read(run)) | {"charts": [{"id": "t", **head, "series": series}]}))
    driver = open_page(path=path)
    width, top, high = one(driver, "#chart-t svg[role=img]").rect["width"], 24, 220 - 24 - 34
    found = {}
    for path in all_of(driver, "#chart-t path[data-series]"):
        bars = re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H[\d.]+Z", path.get_attribute("d"))
        left, low, right, up = (list(map(float, each)) for each in zip(*bars, strict=True))
        found[path.get_attribute("data-series")] = [
            [
                *(round((x - 50) / (width - 50 - 14) * 10, 1) for x in (x0, x1)),
                *(round(1 - (y - top) / high, 2) for y in (y0, y1)),
            ]
            for x0, x1, y0, y1 in zip(left, right, low, up, strict=True)
        ]
    assert found == {  # from step, to step, from share, to share
        "a": [[0, 2, 0, 0.25], [2, 4, 0, 0.5]],
        "b": [[0, 2, 0.25, 1], [2, 4, 0.5, 0.75], [4, 10, 0, 1]],
        "c": [[2, 4, 0.75, 1]],
    }
    chart = one(driver, "#chart-t svg[role=img]")
    ActionChains(driver).move_to_element_with_offset(chart, 0, 0).perform()  # in the middle, at about step 5
    assert legend(driver, "t") == ["step 10", "a0%", "b100%", "c0%"]


def test_the_arrow_keys_and_the_pointer_read_the_values(open_page: Any, run: Path) -> None:
    driver = open_page()
    rewards = [row["reward/mean"] for row in rows_of(run)]
    chart = one(driver, "#chart-reward svg[role=img]")
    assert legend(driver, "reward")[0] == "last, step 12"
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", chart)
    chart.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    said, training, held_out = legend(driver, "reward")
    assert said == "step 1" and number(training) == pytest.approx(rewards[0], abs=1e-3)
    assert held_out.endswith("@0"), "the evaluation next to it, and of which step"
    chart.send_keys(Keys.END)
    said, training, _ = legend(driver, "reward")
    assert said == "step 12" and number(training) == pytest.approx(rewards[-1], abs=1e-3)
    place = driver.execute_script(
        "const d = document.querySelector('#chart-reward path[data-series=training]').getAttribute('d');"
        "return d.split(/[ML]/)[6].split(' ').map(Number)"
    )
    box = chart.rect
    ActionChains(driver).move_to_element_with_offset(chart, place[0] - box["width"] / 2 + 2, 0).perform()
    said, training, _ = legend(driver, "reward")
    assert said == "step 6" and number(training) == pytest.approx(rewards[5], abs=1e-3)
    assert all_of(driver, "#chart-reward .cursor")


def test_the_head_says_what_the_run_was(open_page: Any, run: Path) -> None:
    driver = open_page()
    assert texts(driver, "h1") == ["digits"] and texts(driver, ".state") == ["finished"]
    assert "sequence_mean of [truncated_importance(cap=2.0)" in " ".join(texts(driver, ".facts dd"))
    books = {row[0]: row[1] for row in json.loads((run / "result.json").read_text())["waste"].items()}
    told = {
        row.get_attribute("data-row"): int(re.sub(r"\D", "", row.find_element(By.CSS_SELECTOR, "td").text))
        for row in all_of(driver, ".ledger tbody tr")
    }
    assert told == {name.replace("_", " "): tokens for name, tokens in books.items()}


def fill(driver: Any, **fields: str) -> None:
    for name, value in fields.items():
        field = driver.find_element(By.ID, name.replace("_", "-"))
        field.clear()
        field.send_keys(value)


def test_filters_leave_the_right_rows(open_page: Any) -> None:
    driver = open_page()
    assert count(driver).endswith("of 2\u2009050")  # 48 of the run
    fill(driver, reward_from="0.3", reward_to="0.4", step_from="101", lag_from="2", lag_to="2")
    right = [at for at in range(2000) if at % 10 in (3, 4) and at % 3 == 2]
    assert count(driver) == f"1 to 25 of {len(right)} (of 2\u2009050)"
    assert set(column(driver, "reward")) == {"0.3", "0.4"} and set(column(driver, "lag")) == {"2"}
    fill(driver, step_from="150", step_to="150")
    assert column(driver, "prompt") == [f"number {at}" for at in right if at % 300 == 49]
    one(driver, ".filters button[type=reset]").click()
    assert count(driver) == "1 to 25 of 2\u2009050"
    fill(driver, text="NEEDLE")
    assert count(driver) == "1 to 20 of 20 (of 2\u2009050)"
    assert set(column(driver, "response")) == {"some needle"}
    fill(driver, text="number 1999")
    assert column(driver, "prompt") == ["number 1999"]
    fill(driver, text="nothing at all")
    assert count(driver) == "none of 2\u2009050" and texts(driver, ".none") == ["No rollout passes these filters."]


def test_rows_are_sorted_by_any_column_and_turned_by_pages(open_page: Any) -> None:
    driver = open_page()
    assert [int(step) for step in column(driver, "step")] == sorted(map(int, column(driver, "step")), reverse=True)
    head = one(driver, "th[data-column=reward]")
    head.find_element(By.TAG_NAME, "button").click()
    assert head.get_attribute("aria-sort") == "descending" and column(driver, "reward")[0] == "7.5"
    head.find_element(By.TAG_NAME, "button").click()
    assert head.get_attribute("aria-sort") == "ascending" and set(column(driver, "reward")) == {"0"}
    first = column(driver, "prompt")
    one(driver, "#next").click()
    assert count(driver) == "26 to 50 of 2\u2009050" and column(driver, "prompt") != first
    one(driver, "#back").click()
    assert column(driver, "prompt") == first and one(driver, "#back").get_attribute("disabled")


def open_known(driver: Any) -> Any:
    fill(driver, text="the known one")
    one(driver, "tr.row").click()
    return all_of(driver, ".tokens .token")


def tip(driver: Any) -> dict[str, str]:
    names, values = texts(driver, "#tip dt"), texts(driver, "#tip dd")
    return dict(zip(["what", *names], [*texts(driver, "#tip .what"), *values], strict=True))


def test_a_token_under_the_pointer_says_who_sampled_it_and_how_likely_it_was(open_page: Any) -> None:
    driver = open_page()
    tokens = open_known(driver)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[0])
    ActionChains(driver).move_to_element(tokens[0]).perform()
    assert tip(driver) == {
        "what": '"Hello"',
        "token": "1 of 107",
        "version": "41",
        "lag": "3",
        "log-probability": "-0.6931 nats",
        "probability": "50.00%",
    }
    ActionChains(driver).move_to_element(tokens[3]).perform()
    assert tip(driver) == {
        "what": '"é"',
        "token": "4 of 107",
        "version": "42",
        "lag": "2",
        "log-probability": "-12.0000 nats",
        "probability": "6.1e-4%",
    }
    ActionChains(driver).move_to_element(one(driver, "h2#samples-title")).perform()
    assert all_of(driver, "#tip") == []


def test_the_keyboard_reaches_rows_and_tokens(open_page: Any) -> None:
    driver = open_page()
    first, second = all_of(driver, "tr.row button")[:2]
    driver.execute_script("arguments[0].focus()", first)
    first.send_keys(Keys.ARROW_DOWN)
    assert driver.switch_to.active_element == second
    fill(driver, text="the known one")
    button = one(driver, "tr.row button")
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    tokens = all_of(driver, ".tokens .token")
    driver.execute_script("arguments[0].focus()", tokens[0])
    said = []
    for _ in tokens:
        said.append(tip(driver))
        driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert [each["token"] for each in said] == [f"{at} of 107" for at in (1, 2, 3, 4, 5, 106, 107)], "beyond the cut"
    assert [each["version"] for each in said] == ["41", "41", "42", "42", "42", "43", "43"]
    assert [each["what"] for each in said][1:5] == ['",\\n"', PART, '"é"', '"\\u200b"']
    assert said[2]["log-probability"] == "-4.00e-5 nats" and said[2]["probability"] == ">99.99%"
    assert said[4]["log-probability"] == said[4]["probability"] == "not sampled"
    driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert all_of(driver, "#tip") == []
    button.send_keys(Keys.ENTER)
    assert all_of(driver, ".detail") == []


PART = "part of a character: the token that ends it has all of it"


def test_colours_tell_rare_tokens_or_versions(open_page: Any) -> None:
    driver = open_page()
    tokens = open_known(driver)

    def backs() -> list[str]:
        return [token.value_of_css_property("background-color") for token in tokens]

    def alpha(colour: str) -> float:
        parts = re.findall(r"[\d.]+", colour.replace("srgb", ""))
        return float(parts[3]) if len(parts) > 3 else 1.0

    heat = [alpha(back) for back in backs()]
    assert heat[2] < heat[0] < heat[1] < heat[3] and heat[5] < heat[6], "as rare as they were"
    assert heat[4] == 0, "what was not sampled has no probability"
    one(driver, "button[data-colour=version]").click()
    assert backs()[0] == backs()[1] != backs()[2] == backs()[3] != backs()[5] == backs()[6] != backs()[0]
    assert texts(driver, ".key .token") == ["41 (lag 3)", "42 (lag 2)", "43 (lag 1)"]
    assert texts(driver, ".left-out") == ["100 tokens are left out here"]
    detail = " ".join(texts(driver, ".about-rollout span"))
    for said in ("reward 7.5", "verdict subject failed 0", "format 0.25", "107 tokens, stop", "advantage 0.25"):
        assert said in detail
    one(driver, "tr.row").click()
    one(driver, "tr.row").click()
    assert one(driver, "button[data-colour=version]").get_attribute("aria-pressed") == "true", "it is remembered"


def test_what_a_run_says_is_never_more_than_text(open_page: Any, run: Path, tmp_path: Path) -> None:
    script = "</script><script>window.taken=3</script><img src=x onerror='window.taken=4'>"
    shown = json.loads(re.search(r'id="data">(.*?)</script>', (run / "report.html").read_text(), re.DOTALL)[1])  # type: ignore[index]
    shown |= {"name": script, "error": script, "missing": [script], "facts": [[script, script]]}
    shown["events"] = [{"time": script, "kind": script, "facts": script}]
    shown["waste"][0]["name"] = script
    shown["charts"][0] |= {"title": script, "about": script, "unit": script}
    shown["charts"][0]["series"][0]["name"] = script
    path = tmp_path / "hostile.html"
    path.write_text(page(shown))
    driver = open_page(path=path)
    fill(driver, step_from="600")
    one(driver, "tr.row").click()
    for colouring in ("version", "logprob"):
        one(driver, f"button[data-colour={colouring}]").click()
    ActionChains(driver).move_to_element(all_of(driver, ".tokens .token")[1]).perform()
    assert driver.execute_script("return window.taken") is None
    assert all_of(driver, "img, b, i, body script:not([type]) ~ script") == []
    assert len(all_of(driver, "script")) == 2
    assert texts(driver, "h1") == [script]
    assert "<b>bold</b>" in texts(driver, ".tokens")[0]
    assert "\u202e" not in driver.execute_script("return document.body.innerText"), "nothing turns the text about"


@pytest.mark.parametrize("width", [320, 400, 800, 1280])
def test_the_page_is_as_wide_as_the_window(open_page: Any, width: int) -> None:
    driver = open_page(width)
    open_known(driver)
    one(driver, ".filters button[type=reset]").click()
    fill(driver, step_from="600")
    one(driver, "tr.row").click()
    one(driver, "details summary").click()
    wide = """
        const limit = document.documentElement.clientWidth;
        const inside = (e) => e.closest(".tokens, .prompt, svg, .text") === null;
        return [document.documentElement.scrollWidth - limit, [...document.querySelectorAll("body *")]
            .filter((e) => inside(e) && e.getBoundingClientRect().right > limit + 1)
            .map((e) => `${e.tagName}.${e.className}`)];
    """
    assert driver.execute_script(wide) == [0, []]


def test_dark_follows_the_reader(open_page: Any) -> None:
    colours = []
    for theme in ("light", "dark"):
        driver = open_page(theme=theme)
        colours.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(245, 246, 248)", "rgb(18, 22, 27)"]


def test_thousands_of_rows_stay_few_on_the_page(open_page: Any) -> None:
    driver = open_page()
    assert len(all_of(driver, "tr.row")) == 25
    assert int(driver.execute_script("return document.querySelectorAll('*').length")) < 2500


def test_incidents_are_drawn_where_they_were_and_only_if_there_were_any(
    open_page: Any, run: Path, tmp_path: Path
) -> None:
    driver = open_page()
    assert not one(driver, "#incidents").is_displayed()
    hostile = "<img src=x onerror='window.taken=3'>"
    lost = [
        {"component": "learner", "cause": "signal 9", "time": "t", "step": 3.0, "back": 6.0, "down": "2.0 s"},
        {"component": hostile, "cause": hostile, "time": "t", "step": 12.0, "back": None, "down": "given up"},
    ]
    roles = [{"role": "learner", "lost": 1, "mean": "2.0 s", "most": "2.0 s"}]
    quarantined = [{"prompt": hostile, "cause": "crashed", "times": 3, "traceback": hostile}]
    told = {"steps": 12, "lost": lost, "roles": roles, "quarantined": quarantined}
    path = tmp_path / "incidents.html"
    path.write_text(page(contents(read(run)) | {"incidents": told}))
    for width, theme in ((1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")):
        driver = open_page(width, theme=theme, path=path)
        assert one(driver, "#incidents").is_displayed()
        back, given_up = (each.rect for each in all_of(driver, ".timeline rect"))
        ruled = [each.rect["x"] for each in all_of(driver, ".timeline .rule")]
        per_step = (ruled[-1] - ruled[0]) / 12 if width > 400 else (ruled[1] - ruled[0]) / 10
        assert back["x"] - ruled[0] == pytest.approx(3 * per_step, abs=1.5)
        assert back["width"] == pytest.approx(3 * per_step, abs=1.5)
        assert given_up["width"] == pytest.approx(6, abs=1), "one that did not come back is seen all the same"
        assert given_up["y"] != back["y"]
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert driver.execute_script("return window.taken") is None
    assert texts(driver, "#incidents .grid td.name") == ["learner"]
    assert any(hostile in text for text in texts(driver, "#incidents pre"))
