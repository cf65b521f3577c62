"""The pages in a real browser: by keyboard, in the dark, on a phone, while a run goes on."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from scheduler.review.gathering import report_since
from scheduler.review.html_report import html
from tests.conftest import until
from tests.intake.api import PROJECTS
from tests.review import browser
from tests.review.scene import a_fortnight
from tests.review.site import Site, new_jobs
from worker.ledger import JobState, Kept, NewJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.review.browser import Tab

pytestmark = pytest.mark.skipif(
    browser.find() is None,
    reason="there is no Chromium: `apt-get install chromium` (Debian) brings it",
)

FOCUSED = "document.activeElement"
# How much brighter text is than what it stands on (WCAG 2.2, "contrast ratio"). A canvas gives any
# colour as red, green and blue.
FAINT = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => color.slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = rgba(getComputedStyle(each).backgroundColor);
      if (color[3] === 255) return color;
    }
    return rgba("white");
  };
  const faint = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const drawn = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const two = [light(rgba(drawn)), light(ground(element))].sort((a, b) => b - a);
    const ratio = (two[0] + 0.05) / (two[1] + 0.05);
    if (ratio < 4.5) faint.push(`${texts.currentNode.data.trim()}: ${ratio.toFixed(2)}`);
  }
  return faint;
})()"""


# The captions of tables that are wider than the room that they have.
WIDER = """[...document.querySelectorAll("{}")]
  .filter((table) => table.scrollWidth > table.parentElement.clientWidth)
  .map((table) => table.parentElement.getAttribute("aria-label"))"""
OVERHANG = "(each) => each.scrollWidth - each.clientWidth"
OF_NUMBERS = {
    "Jobs by outcome and by the day on which their runs were made",
    "Nodes that were freed, by flavor",
}
A4_PX = 680
"""A sheet's width without its margins, 180 mm, as CSS has it."""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with browser.running(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
async def tab(chromium: str) -> AsyncIterator[Tab]:
    async with browser.tab(chromium) as opened:
        await opened.size(1200, 800)
        yield opened


async def pages(site: Site) -> list[str]:
    """A page of each kind, with much on it."""
    run_id = await a_fortnight(site)
    run = f"{site.url}/runs/{run_id}"
    return [
        f"{site.url}/",
        f"{site.url}/runs",
        run,
        f"{run}?q=team&outcome=failed",
        f"{run}/jobs/43",
        f"{run}/kept",
    ]


async def test_no_page_makes_the_browser_complain(site: Site, tab: Tab) -> None:
    for url in await pages(site):
        await tab.open(url)
        assert await tab.ask("document.styleSheets[0].cssRules.length") > 50
    assert tab.complaints == []


async def test_what_the_policy_forbids_would_be_noticed(site: Site, tab: Tab) -> None:
    await tab.open(f"{site.url}/")
    await tab.ask("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">x</p>')")

    async def complained() -> bool:
        return any("Content Security Policy" in each for each in tab.complaints)

    await until(complained)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_can_be_read_in_the_light_and_in_the_dark(
    site: Site, tab: Tab, scheme: str
) -> None:
    await tab.prefer(scheme)
    for url in await pages(site):
        await tab.open(url)
        assert await tab.ask(FAINT) == [], url
    ground = await tab.ask("getComputedStyle(document.documentElement).backgroundColor")
    parts = [int(part) for part in ground.removeprefix("rgb(").removesuffix(")").split(",")]
    assert (max(parts) < 64) if scheme == "dark" else (min(parts) > 192)


async def test_on_a_phone_only_tables_of_numbers_are_wider_than_the_screen(
    site: Site, tab: Tab
) -> None:
    await tab.size(390, 844)
    long = "w" * 300
    job = NewJob(PROJECTS[0], "p" * 63, display_name=long, chosen=long)
    kept = [Kept(PROJECTS[0], "k" * 63, long, long)]
    run_id = await site.run([job], kept=kept, reason=long, policy=long, selector=long)
    await site.end(run_id, [JobState.FAILED], status=400, code="c" * 64, reason=long)
    wide = [f"{site.url}/runs/{run_id}{rest}" for rest in ("", "/kept", "/jobs/0")]
    for url in [*await pages(site), *wide]:
        await tab.open(url)
        assert await tab.ask("document.documentElement.scrollWidth") == 390, url
        assert await tab.ask("document.querySelector('main').scrollWidth") <= 390, url
        assert set(await tab.ask(WIDER.format("table"))) <= OF_NUMBERS, url


async def test_everything_can_be_reached_and_seen_by_keyboard(site: Site, tab: Tab) -> None:
    run_id = await a_fortnight(site)
    await tab.open(f"{site.url}/runs/{run_id}")
    can_focus = "main.querySelectorAll('a, select, input, button, .scroll').length"
    there = await tab.ask(f"(main => {can_focus})(document.querySelector('main'))")
    hidden = await tab.ask("document.querySelectorAll('[hidden] a').length")
    seen = set()
    await tab.press("Tab")
    assert await tab.ask(f"{FOCUSED}.textContent") == "Skip to the content"
    assert await tab.ask(f"{FOCUSED}.getBoundingClientRect().top") >= 0
    await tab.press("Enter", "\r")
    assert await tab.ask(f"{FOCUSED}.id") == "main"
    while True:
        await tab.press("Tab")
        if await tab.ask(f"{FOCUSED} === document.body"):
            break
        place = await tab.ask(
            f"[...document.querySelector('main').querySelectorAll('*')].indexOf({FOCUSED})"
        )
        assert place not in seen, "the focus goes around in a circle"
        seen.add(place)
        assert await tab.ask(f"getComputedStyle({FOCUSED}).outlineStyle") == "solid"
        assert await tab.ask(f"parseFloat(getComputedStyle({FOCUSED}).outlineWidth)") >= 2
    assert len(seen) == there - hidden


async def test_from_the_overview_to_a_call_by_keyboard_alone(site: Site, tab: Tab) -> None:
    run_id = await a_fortnight(site)
    await tab.open(f"{site.url}/")

    async def go_to(what: str) -> None:
        for _ in range(200):
            await tab.press("Tab")
            if await tab.ask(f"{FOCUSED}.matches({what!r})"):
                return
        raise AssertionError(f"{what} was not reached")

    await go_to(f'a[href="/runs/{run_id}"]')
    await tab.follow()
    await go_to("#q")
    for letter in "team-43":
        await tab.press(letter, letter)
    await tab.follow()
    assert await tab.ask("document.querySelectorAll('#jobs ~ .scroll tbody tr').length") == 1
    await go_to(f'a[href="/runs/{run_id}/jobs/43"]')
    await tab.follow()
    assert "ModelArts.0010" in await tab.ask("document.querySelector('.timeline').textContent")


async def test_the_progress_of_a_run_moves_by_itself(site: Site, tab: Tab) -> None:
    run_id = await site.run(new_jobs(3))
    await tab.open(f"{site.url}/runs/{run_id}")
    await tab.ask("window.stayed = true")

    async def shows(done: str, status: str) -> bool:
        return bool(
            await tab.ask("document.querySelector('[data-live=done]').textContent") == done
            and status in await tab.ask("document.querySelector('[data-live=status]').textContent")
        )

    await until(lambda: shows("0", "Live"))
    await site.end(run_id, [JobState.DELETED])
    await until(lambda: shows("1", "Live"))
    assert await tab.ask("document.querySelector('progress').value") == 1
    count = "document.querySelector('[data-count=deleted]')"
    assert (
        await tab.ask(f"{count}.checkVisibility() && {count}.querySelector('b').textContent") == "1"
    )
    await site.end(run_id, [JobState.FAILED, JobState.SKIPPED], first=1)
    await until(lambda: shows("3", "It has ended."))
    assert "finished" in await tab.ask("document.querySelector('[data-live=badge]').textContent")
    assert await tab.ask("window.stayed"), "the page was not loaded anew"
    assert tab.complaints == []


async def test_a_run_that_is_cancelled_while_it_is_watched_says_so(site: Site, tab: Tab) -> None:
    run_id = await site.run(new_jobs(3))
    await tab.open(f"{site.url}/runs/{run_id}")
    badge = "document.querySelector('[data-live=badge]').textContent.trim()"

    async def is_cancelled() -> bool:
        return bool(await tab.ask(badge) == "finished, cancelled")

    assert await tab.ask(badge) == "running"
    await site.ledger.cancel(run_id)
    await until(is_cancelled)
    await tab.open(f"{site.url}/runs/{run_id}")
    assert await is_cancelled()


async def test_without_scripts_all_but_the_live_progress_works(site: Site, tab: Tab) -> None:
    run_id = await a_fortnight(site)
    await tab.send("Emulation.setScriptExecutionDisabled", value=True)
    await tab.open(f"{site.url}/runs/{run_id}?q=team-43")
    assert await tab.ask("document.querySelectorAll('#jobs ~ .scroll tbody tr').length") == 1
    assert await tab.ask("document.querySelector('progress').value") == 48
    status = await tab.ask("document.querySelector('[data-live=status]').textContent")
    assert status.startswith("As it was when the page was made")


async def test_on_paper_there_is_nothing_to_click(site: Site, tab: Tab) -> None:
    run_id = await a_fortnight(site)
    await tab.open(f"{site.url}/runs/{run_id}")
    await tab.send("Emulation.setEmulatedMedia", media="print")
    for selector, shown in (("nav", False), ("form", False), ("table", True), ("h1", True)):
        seen = await tab.ask(f"document.querySelector({selector!r}).checkVisibility()")
        assert seen is shown, selector
    assert (await tab.send("Page.printToPDF"))["data"]


# The report


@pytest.fixture
async def report(site: Site, tmp_path: Path) -> str:
    """The URL of a report about a fortnight, as a file."""
    await a_fortnight(site)
    long = await site.run([NewJob(PROJECTS[0], "p" * 63, display_name="w" * 120)])
    await site.end(long, [JobState.FAILED], status=400, code="ModelArts.1")
    file = tmp_path / "report.html"
    file.write_text(html(await report_since(site.redis, site.ledger, timedelta(days=14), None)))
    return file.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_report_can_be_read_on_a_phone_in_the_light_and_in_the_dark(
    report: str, tab: Tab, scheme: str
) -> None:
    await tab.prefer(scheme)
    await tab.size(390, 844)
    await tab.open(report)
    assert await tab.ask("document.documentElement.scrollWidth") == 390
    assert await tab.ask(WIDER.format(".cards")) == []
    assert await tab.ask(FAINT) == []
    assert tab.complaints == []


async def test_a_report_fits_on_a_screen(report: str, tab: Tab) -> None:
    await tab.size(1280, 800)
    await tab.open(report)
    wide = f"[...document.querySelectorAll('.scroll')].map({OVERHANG}).filter((px) => px > 0)"
    assert await tab.ask(wide) == []


async def test_a_report_fits_on_paper_and_is_dark_on_light_there(report: str, tab: Tab) -> None:
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    await tab.size(A4_PX, 1000)
    await tab.send("Emulation.setEmulatedMedia", media="print", features=[dark])
    await tab.open(report)
    assert await tab.ask("document.documentElement.scrollWidth") <= A4_PX
    assert await tab.ask(WIDER.format("table")) == []
    assert await tab.ask("getComputedStyle(document.body).color") == "rgb(28, 32, 36)"
