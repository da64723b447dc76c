"""The page of a run in a real browser: from a file, by keyboard, on a phone, in the dark, and for
people who don't see it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_run import (
    ARTIFACT,
    champion_answers,
    evaluation,
    finished_run,
    older_evaluation,
    page_of,
)
from playwright.sync_api import Browser, Page, expect, sync_playwright

from distillery.records import GateDecision

pytestmark = pytest.mark.slow

AXE = Path(__file__).parents[1] / "support/axe/node_modules/axe-core/axe.min.js"

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "this test needs Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run that was compared with a champion."""
    folder = tmp_path_factory.mktemp("page")
    decision = finished_run().decision
    champion = {"champion": "desk version 1", "champion_answers": ARTIFACT}
    run = finished_run(decision=GateDecision.model_validate(decision.model_dump() | champion))
    return page_of(folder, run, evaluation(folder / "evaluation"), champion_answers(folder))


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """`open_page(file, **options)`: the page in a window of its own. It fails if the page asks for
    anything but itself or complains."""
    pages: list[Page] = []
    unwanted: list[str] = []

    def open_page(file: Path, **options: Any) -> Page:
        options = {"viewport": {"width": 1200, "height": 900}} | options
        page = browser.new_page(**options)
        pages.append(page)
        page.set_default_timeout(10_000)
        page.on("console", lambda message: unwanted.append(message.text))
        page.on("pageerror", lambda error: unwanted.append(str(error)))
        page.on("request", lambda request: unwanted.append(request.url))
        page.goto(file.as_uri())
        assert unwanted.pop(0) == file.as_uri()
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert unwanted == []


def shown_rows(page: Page) -> list[str]:
    """Return the ids of the rows that are visible, in the order that they are shown."""
    return page.locator("#rows tbody tr:visible .id").all_inner_texts()


def open_details(page: Page) -> None:
    """Open the tables behind the charts."""
    page.evaluate("document.querySelectorAll('details').forEach(each => (each.open = true))")


def test_the_page_opens_at_the_students_errors(open_page: Open, file: Path) -> None:
    page = open_page(file)
    expect(page.get_by_role("heading", name="Verdict")).to_be_visible()
    expect(page.get_by_text("Refused", exact=True)).to_be_visible()
    expect(page.get_by_role("img")).to_have_count(5)
    assert shown_rows(page) == ["row-2", "row-3"]
    assert page.title() == "desk-1: refused"


def test_the_filters_work_by_keyboard_alone(open_page: Open, file: Path) -> None:
    page = open_page(file)
    focused = "document.activeElement.name || document.activeElement.textContent.trim()"

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(focused) == name:
                return
        raise AssertionError(f"no Tab leads to {name}")

    tab_to("show")
    page.keyboard.type("changed")
    expect(page.locator("#shown")).to_have_text("3 of 12 rows")
    assert shown_rows(page) == ["row-2", "row-3", "row-5"]
    tab_to("gold")
    page.keyboard.type("neither")
    assert shown_rows(page) == ["row-2", "row-5"]
    tab_to("student")
    page.keyboard.type("pleased")
    assert shown_rows(page) == ["row-2"]
    tab_to("Reset filters")
    page.keyboard.press("Enter")
    expect(page.locator("#shown")).to_have_text("2 of 12 rows")


@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        ({"show": "differs"}, ["row-2", "row-3", "row-4"]),
        ({"champion": "B"}, ["row-1", "row-4", "row-5", "row-7", "row-10"]),
        ({"teacher": "C", "gold": "B"}, ["row-4"]),
        ({"student": "none"}, ["row-3"]),
        ({"low": "0.9", "high": "0.93"}, ["row-10"]),
        ({"text": "MESSAGE 1"}, ["row-10", "row-11"]),
        ({"order": "unsure", "gold": "A"}, ["row-0", "row-6", "row-9", "row-3"]),
        ({"order": "sure", "gold": "A"}, ["row-9", "row-6", "row-0", "row-3"]),
    ],
)
def test_each_filter(open_page: Open, file: Path, asked: dict[str, str], rows: list[str]) -> None:
    page = open_page(file)
    for name, value in ({"show": ""} | asked).items():
        field = page.locator(f"#filters [name={name}]")
        if field.evaluate("element => element.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)
    assert shown_rows(page) == rows


def test_what_stands_in_a_row_is_shown_and_not_run(open_page: Open, file: Path) -> None:
    page = open_page(file)
    page.locator("#filters [name=text]").fill("<script>")
    page.locator("#filters [name=show]").select_option("")
    assert shown_rows(page) == ["row-1"]
    expect(page.locator("#rows tbody tr:visible th")).to_contain_text("<script>document.title")
    assert page.title() == "desk-1: refused"


def test_without_scripts_all_rows_are_there(browser: Browser, file: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(file.as_uri())
    expect(page.locator("#rows tbody tr")).to_have_count(12)
    expect(page.locator("#filters")).to_be_hidden()
    page.context.close()


def test_a_phone_shows_all_without_scrolling_sideways(open_page: Open, file: Path) -> None:
    page = open_page(file, viewport={"width": 360, "height": 740}, has_touch=True)
    page.locator("#filters [name=show]").select_option("")
    open_details(page)
    widths = "[document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert max(page.evaluate(widths)) <= 360
    expect(page.locator("#rows tbody tr:visible").first).to_contain_text("message 0")
    # The smallest text of a chart, in pixels.
    size = page.evaluate(
        "Math.min(...Array.from(document.querySelectorAll('svg text'), text =>"
        " parseFloat(getComputedStyle(text).fontSize)"
        " * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b)))"
    )
    assert size >= 8.5


def test_the_page_follows_the_dark_scheme(open_page: Open, file: Path) -> None:
    colours = (
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('svg text')).fill]"
    )
    light = open_page(file, color_scheme="light").evaluate(colours)
    dark = open_page(file, color_scheme="dark").evaluate(colours)
    assert light == ["rgb(255, 255, 255)", "rgb(27, 36, 48)"]
    assert dark == ["rgb(18, 22, 28)", "rgb(230, 234, 240)"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("age", ["new", "older"])
def test_axe_finds_nothing(
    open_page: Open, file: Path, tmp_path: Path, scheme: str, width: int, age: str
) -> None:
    if age == "older":
        file = page_of(tmp_path, finished_run(), older_evaluation(tmp_path / "evaluation"))
    assert AXE.exists(), "axe-core is not installed; run npm ci --prefix tests/support/axe"
    page = open_page(file, color_scheme=scheme, viewport={"width": width, "height": 800})
    open_details(page)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 15
    told = [
        (violation["id"], violation["impact"], [node["target"] for node in violation["nodes"]])
        for violation in found["violations"]
    ]
    assert told == [], json.dumps(told, indent=1)
