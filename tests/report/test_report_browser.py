"""report.html in a real browser: what it loads, how it lies on a phone and a desk, and that its pictures are there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_run
from browsers import contrast, launched
from playwright.sync_api import Browser, Page

from rlhf_pipeline import report

pytestmark = pytest.mark.slow

WIDTHS = (390, 1440)
# Of every element that prints text of its own: that text, its colour, and what it stands on.
COLOURS = """() => {
  const opaque = e => { for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$|^transparent$/.test(c)) return c; }
    return getComputedStyle(document.documentElement).backgroundColor; };
  const numbers = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
  return [...document.querySelectorAll('h1, h2, .lead, .badge, th, td, .note, a, figcaption p, .alarms li,' +
      '.legend li,.role, .reply footer, .reply .text, summary, code, dt, dd, svg text')]
    .filter(e => e.checkVisibility() && e.textContent.trim())
    .map(e => [e.className.baseVal ?? e.tagName + '.' + e.className,
      numbers(getComputedStyle(e)[e instanceof SVGElement ? 'fill' : 'color']), numbers(opaque(e))]);
}"""
PICTURES = """() => [...document.querySelectorAll('svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const drawn = [...svg.querySelectorAll('path, rect, use')].filter(e => {
    const one = e.getBoundingClientRect(), style = getComputedStyle(e);
    return one.width + one.height > 0 && (style.stroke !== 'none' || style.fill !== 'none');
  });
  return [svg.querySelector('title')?.textContent ?? svg.className.baseVal, box.width, box.height, drawn.length];
})"""
TOO_WIDE = """() => [...document.querySelectorAll('body *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, svg'))
  .map(e => e.tagName + '.' + e.className)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """Pages: of a run whose every text is hostile and long; of a sound one over it; of one that has nothing."""
    folder = tmp_path_factory.mktemp("reports")
    sound = report_run.write(folder / "sound")
    text = report_run.HOSTILE + report_run.LONG
    hostile = report_run.write(folder / "hostile", text=text, name=report_run.HOSTILE)
    report_run.change(hostile, "dpo", state="failed", error=text)
    (folder / "empty").mkdir()
    runs = {"hostile": [hostile], "both": [sound, hostile], "empty": [folder / "empty"]}
    for name, given in runs.items():
        report.write(given, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in runs}


def opened(browser: Browser, file: Path, width: int, scheme: Any = "light") -> tuple[Page, list[str]]:
    """A page, with all that went wrong on it and all that it asked for."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on("request", lambda asked: wrong.append(f"request: {asked.url}") if asked.url != file.as_uri() else None)
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    return page, wrong


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["hostile", "both", "empty"])
def test_it_lies_on_the_screen_and_asks_for_nothing(name, width, browser, reports):
    page, wrong = opened(browser, reports[name], width)
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(TOO_WIDE) == []
    assert page.title().endswith("report") and page.title() != "hacked"
    assert page.locator("script, img, iframe, object, embed").count() == 0
    pictures = page.evaluate(PICTURES)
    assert len(pictures) > 40 or name == "empty"
    for title, wide, high, drawn in pictures:
        assert wide > 20 and high > 5 and drawn > 0, title
    assert page.evaluate("document.documentElement.scrollHeight") < 120_000
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme, browser, reports):
    page, _ = opened(browser, reports["both"], 1440, scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(rgb(dark)) < 60) == (scheme == "dark")
    found = page.evaluate(COLOURS)
    assert len(found) > 500
    for what, ink, ground in found:
        assert contrast(ink, ground) >= 4.5, (what, ink, ground)
    for i in range(6):  # lines
        ink = page.evaluate(
            f"(() => {{ const one = document.createElement('i'); one.style.color = 'var(--s{i})';"
            "document.body.append(one); return getComputedStyle(one).color; })()"
        )
        ground = page.locator("figure.box").first.evaluate("one => getComputedStyle(one).backgroundColor")
        assert contrast(rgb(ink), rgb(ground)) >= 3, i
    page.close()


def test_hostile_text_is_there_to_read(browser, reports):
    page, wrong = opened(browser, reports["hostile"], 1440)
    shown = page.locator(".alarms .text").first
    assert "<script>document.title='hacked'" in shown.inner_text()
    reply = page.locator(".reply .text").first
    assert reply.evaluate("one => [one.clientHeight < 400, one.scrollHeight > one.clientHeight]") == [True, True]
    assert reply.get_attribute("dir") == "auto"
    assert wrong == []
    page.close()


def test_it_can_be_printed(browser, reports):
    page, wrong = opened(browser, reports["both"], 1440, "dark")
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = false)")
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF") and len(printed) > 50_000
    page.emulate_media(media="print")
    assert min(rgb(page.evaluate("getComputedStyle(document.body).backgroundColor"))) > 240  # on paper it is light
    hidden = (
        "() => [...document.querySelectorAll('details td, details .spark')].filter(e => !e.checkVisibility()).length"
    )
    inside = page.locator("details .spark").first.bounding_box()
    assert inside and inside["height"] > 5, "what is folded away is not printed"
    assert page.evaluate(hidden) == 0
    assert wrong == []
    page.close()


def rgb(colour: str) -> list[float]:
    return [float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
