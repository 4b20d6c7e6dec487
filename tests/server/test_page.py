"""The page at /annealing, in headless Chromium; with EAD_SCREENSHOTS, pictures of it go there."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from ead_server.launch.process import ServerProcess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")


def test_it_is_one_file_that_asks_nobody_else(server: ServerProcess) -> None:
    answer = httpx.get(f"{server.url}/annealing", timeout=30)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'; connect-src 'self'" in answer.headers["content-security-policy"]
    assert not re.findall(r"""(?:src|href)=|https?://|@import|\burl\(""", answer.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, server: ServerProcess) -> Iterator[Any]:
    """The page, which must say nothing on the console."""
    opened = browser.new_page(color_scheme=request.param, viewport={"width": 1100, "height": 900})
    said: list[str] = []
    opened.on("console", lambda message: said.append(f"{message.text} {message.location['url']}"))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(f"{server.url}/annealing")
    opened.get_by_role("region", name="schedule B").wait_for()
    yield opened
    picture(opened, re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-"))
    opened.close()
    # Chromium tells of every answer that is no 200
    assert [text for text in said if not re.match(r"Failed to load .* 400 .*preview", text)] == []


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("EAD_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@needs_chromium
def test_a_schedule_is_drawn_and_used(page: Any, server: ServerProcess) -> None:
    plot = page.get_by_role("region", name="schedule A").get_by_role("img")
    expect(page.locator("polyline")).to_have_count(6)  # two schedules at three steps
    slider = page.get_by_label("tau_max of A, slider")
    slider.focus()
    before = plot.get_attribute("aria-label")
    for _ in range(6):
        page.keyboard.press("ArrowRight")  # 1.2 to 1.5
    expect(plot).not_to_have_attribute("aria-label", before)
    page.get_by_label("decay of A", exact=True).fill("60")
    page.get_by_label("Prompt").fill("def schedule(")
    page.get_by_label("Answers").fill("2")
    page.get_by_label("Tokens", exact=True).fill("24")
    page.get_by_label("compare with schedule B").check()
    page.get_by_role("button", name="Generate").press("Enter")
    page.get_by_text("done", exact=True).wait_for(timeout=60_000)

    for letter in "AB":
        answers = page.get_by_role("region", name=f"answers with schedule {letter}")
        assert answers.get_by_label(re.compile("answer [12]")).count() == 2
        assert re.search(r"Diversity\s*\d+ %", answers.inner_text())
        assert re.search(r"Agreement\s*\d+ %", answers.inner_text())
    tokens = page.locator("section[aria-label='answers with schedule A'] .token")
    assert page.get_by_text("24 tokens, length").count() >= 2  # also those without a text
    told = [tokens.nth(i).get_attribute("title") for i in range(tokens.count())]
    taus = [float(re.search(r"temperature ([\d.]+)", title)[1]) for title in told]  # type: ignore[index]
    assert taus[0] == 1  # warm-up
    assert abs(max(taus) - (1 + 1.5 - math.exp(10 / 60))) < 1e-3  # with what the slider said
    colours = tokens.evaluate_all("spans => spans.map(span => span.style.background)")
    assert len(set(colours)) > 5
    page.get_by_label("Colour by").select_option("entropy")
    assert tokens.evaluate_all("spans => spans.map(span => span.style.background)") != colours
    page.get_by_text("Numbers of every token").first.click()
    assert page.get_by_role("table").first.get_by_role("row").count() == len(told) + 1


@needs_chromium
def test_what_is_copied_is_the_request(page: Any, server: ServerProcess, tmp_path: Path) -> None:
    page.get_by_label("Prompt").fill('it\'s "quoted" \\ and $HOME\nnext')
    page.get_by_label("Tokens", exact=True).fill("5")
    command, script = page.evaluate("[curl(), python()]")
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    choices = json.loads(answer.stdout)["choices"]
    assert len(choices) == 3
    assert choices[0]["rollout"]["annealing"]["schedule"] == "ead"
    (tmp_path / "asked.py").write_text(script)
    ran = subprocess.run(
        [sys.executable, "asked.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert 1 <= len(ran.stdout.splitlines()) <= 5


@needs_chromium
def test_a_mistake_is_told_beside_the_schedule(page: Any) -> None:
    page.get_by_label("tau_max of A", exact=True).fill("99")
    page.get_by_text(re.compile(r"annealing.tau_max: .*\[0.01, 10.0\]")).wait_for()
    page.get_by_label("tau_max of A", exact=True).fill("1.2")
    expect(page.get_by_role("alert").first).to_be_empty()


@needs_chromium
def test_an_empty_number_of_answers_is_told_and_does_not_disable_the_page(page: Any) -> None:
    answers = page.get_by_label("Answers", exact=True)
    generate = page.get_by_role("button", name="Generate")
    answers.fill("")
    generate.press("Enter")
    assert answers.evaluate("field => field.validationMessage")
    expect(generate).to_be_enabled()
    answers.fill("1")
    page.get_by_label("Tokens", exact=True).fill("4")
    generate.press("Enter")
    page.get_by_text("done", exact=True).wait_for(timeout=60_000)
    expect(generate).to_be_enabled()
