"""The arena's page in a real browser, against the real server: what a person sees, types, and loses nothing of."""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from browsers import contrast, launched
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from rlhf_pipeline.arena import server
from rlhf_pipeline.arena.session import Session, Setup
from rlhf_pipeline.rundir.choices import Target
from rlhf_pipeline.rundir.items import Item, item, pair_key
from rlhf_pipeline.rundir.labels import Label, Labels, Pair

pytestmark = pytest.mark.slow

STAGE = "feedback"
DIMENSIONS = ("helpfulness", "honesty", "harmlessness", "conciseness")
READ_MS = 260  # sooner than that after a pair is shown nobody can have read it, and a key does nothing
GOOD, BAD = "It names the moth.", "Ask somebody else."
HOSTILE = (
    "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\"> [x](javascript:alert(1))"
)
CODE = (
    "Keep the order:\n\n```python\ndef unique(values: list[int]) -> list[int]:\n    return list(dict.fromkeys(values))"
)
CODE += "  # one long line that has to be scrolled by itself\n```\n\n| way | order |\n|---|---|\n| `set` | no |\n"
ARABIC = "استخدم `set(values)` فقط، لكن الترتيب يضيع."
LONG = "\n\n".join(f"**Step {n}.** The trail climbs slowly through the pines." for n in range(60)) + "x" * 400
# Of every element that prints text of its own: that text, its colour, and what it stands on.
COLOURS = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const ground = e => { for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; }
    return getComputedStyle(document.documentElement).backgroundColor; };
  return [...document.querySelectorAll('body *')]
    .filter(e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
    .map(e => [e.tagName + ' ' + e.textContent.slice(0, 40),
      numbers(getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color']), numbers(ground(e))]);
}"""
TOO_WIDE = """() => [...document.querySelectorAll('body *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, svg, pre, .snippet, .unseen'))
  .map(e => e.tagName + '.' + e.className)"""


# Remembers what the banner said when it was shown last: after the next try it is gone.
REMEMBER = """() => {
  const banner = document.querySelector('[role=alert]');
  const note = () => { if (!banner.hidden) document.body.dataset.said = banner.innerText; };
  new MutationObserver(note).observe(banner, {attributes: true});
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


class Arena:
    """The server in a thread of this process, and the links of those who may come; the first is the owner."""

    def __init__(self, file: Path, setup: Setup, people: tuple[str, ...]) -> None:
        self.labels = Labels(file)
        self.session = Session(setup, self.labels, people)
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        self.links = {name: server.link("127.0.0.1", port, f"{name}-token") for name in people}
        for name in people:
            self.labels.admit(name, f"{name}-token", is_owner=name == people[0])
        app = server.app(self.session, self.labels, "127.0.0.1", port)
        self.server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error", ws="none"))
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.session.close()
        self.labels.close()

    def of(self, person: str) -> list[Label]:
        return [label for label in self.labels.of(STAGE) if label.person == person]

    def said(self, label: Label) -> str:
        """The text of the reply that a label says is better, or its choice."""
        pair = self.labels.pairs(STAGE)[label.pair]
        return str(getattr(pair, label.choice, label.choice))


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Callable[..., Arena]]:
    """Opens an arena for items and people, and closes it."""
    with contextlib.ExitStack() as opened:

        def open_(items: list[Item], names: tuple[str, ...] = ("anna",), **more: Any) -> Arena:
            replies = sum(len(one.replies) for one in items)
            features = np.random.default_rng(0).normal(size=(replies, 16)).astype(np.float32)
            one = Arena(
                tmp_path / "labels.db",
                Setup("support-bot", STAGE, items, dimensions=DIMENSIONS, features=features, **more),
                names,
            )
            opened.callback(one.close)
            return one

        yield open_


def plums(count: int) -> list[Item]:
    return [item(f"Question {n} of the plums?", [f"{GOOD} ({n})", f"{BAD} ({n})"]) for n in range(count)]


def opened(browser: Browser, link: str, width: int = 1440, scheme: Any = "light") -> tuple[Page, list[str]]:
    """The page behind a link, and all that goes wrong on it."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    wrong: list[str] = []
    host = link.split("?")[0]
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on("request", lambda asked: None if asked.url.startswith((host, "data:")) else wrong.append(asked.url))
    page.goto(link)
    expect(page.locator("h1")).to_have_text("support-bot")
    return page, wrong


def press(page: Page, *keys: str) -> None:
    """Keys of one pair; the last one ends it, and what follows is on the page when this returns."""
    shown = page.locator("#number").inner_text()
    page.wait_for_timeout(READ_MS)
    for key in keys:
        page.keyboard.press(key)
    page.wait_for_function(
        "shown => document.querySelector('#nothing').checkVisibility() || number.textContent !== shown", arg=shown
    )


def better(page: Page) -> str:
    """The arrow key of the better reply."""
    return "ArrowLeft" if GOOD in page.locator("#left").inner_text() else "ArrowRight"


def worse(page: Page) -> str:
    return "ArrowRight" if better(page) == "ArrowLeft" else "ArrowLeft"


def test_a_whole_session_by_keyboard(browser, arena):
    target = Target(labels=6)
    one = arena(plums(8), target=target, command="rlhf-pipeline run plums.yaml")
    page, wrong = opened(browser, one.links["anna"])
    said = []

    def answer(*keys: str, means: str) -> None:
        press(page, *keys)
        said.append(means)

    answer(better(page), means=GOOD)
    expect(page.locator("#status")).to_contain_text("✓ Saved")
    expect(page.locator("#belief-text")).to_contain_text(
        re.compile(r"You said [AB] is better\. .* \d+% \(\d+% to \d+%\)")
    )
    answer("t", means="tie")
    answer("ArrowUp", means="tie")
    answer("ArrowDown", means="bad")
    answer("b", means="bad")
    answer("s", means="skip")
    for key in ("1", better(page), "2", "t", "4", worse(page), "3", "ArrowDown", "Escape", "r"):
        page.keyboard.press(key)
    page.keyboard.type("b and s are letters here: ← too")
    page.keyboard.press("Escape")
    answer(better(page), means=GOOD)
    expect(page.get_by_role("heading", name="The target is reached")).to_be_visible()
    expect(page.locator("#reached")).to_contain_text("rlhf-pipeline run plums.yaml")
    expect(page.locator("#progress-text")).to_contain_text("6 of 6 labels")
    answer(better(page), means=GOOD)
    expect(page.get_by_role("heading", name="Nothing is left for you")).to_be_visible()
    made = one.of("anna")
    assert [one.said(label).split(" (")[0] for label in made] == said
    reasoned = made[6]
    best = reasoned.choice
    assert reasoned.dimensions == {
        "helpfulness": best, "honesty": "tie", "conciseness": "second" if best == "first" else "first"
    }  # fmt: skip
    assert reasoned.reason == "b and s are letters here: ← too"
    assert all(label.seconds is not None and 0.2 < label.seconds < 30 for label in made)
    assert wrong == []
    page.context.close()


def test_what_is_learnt_and_where_a_policy_would_drift(browser, arena, tmp_path):
    items = [item(f"Question {n}?", [f"{GOOD} ({n})", f"{BAD} ({n})", f"Nothing. ({n})"]) for n in range(30)]
    with Labels(tmp_path / "labels.db") as labels:  # of another person, who had each pair by chance
        for number, each in enumerate(items[:20]):
            pair = Pair(pair_key(each.prompt, *each.replies[:2]), each.key, each.prompt, *each.replies[:2])
            labels.add(Label(f"{number:08}", pair.key, STAGE, "bo", "first"), pair)
    one = arena(items, target=Target(reward_accuracy=">= 0.9"))
    page, wrong = opened(browser, one.links["anna"])
    for labels in (21, 22):
        press(page, "ArrowLeft")
        expect(page.locator("#history").get_by_role("img", name=re.compile(rf"now 0\.\d\d at {labels} labels")))
    expect(page.locator("#accuracy")).to_have_text(re.compile(r"[01]\.\d\d"))
    assert re.fullmatch(
        r"0\.\d\d to [01]\.\d\d \(95%\), 2\d labels, ties apart", page.locator("#accuracy-interval").inner_text()
    )
    assert page.get_by_role("img", name=re.compile(r"Calibration: said \d+%, chosen \d+% of \d+")).is_visible()
    shares = page.locator("#candidates .share")
    expect(shares).to_have_count(3)
    assert {"Reply A", "Reply B"} <= {text.strip() for text in page.locator("#candidates .letter").all_text_contents()}
    page.get_by_role("slider", name="β, the price of KL").focus()
    kl = []
    for key in ("Home", "End"):  # the reward alone, and the base
        before = page.locator("#kl").inner_text()
        page.keyboard.press(key)
        expect(page.locator("#kl")).not_to_have_text(before)
        kl.append(float(page.locator("#kl").inner_text().split()[0]))
        shown = [int(text.rstrip("%")) for text in shares.all_inner_texts()]
        assert 98 <= sum(shown) <= 102
        assert (max(shown) > 90) == (key == "Home")
    assert kl[0] > 1 > 0.1 > kl[1]
    assert len(one.of("anna")) == 2  # the slider's keys choose nothing
    assert wrong == []
    page.context.close()


def test_undo_reload_and_a_key_held_down(browser, arena):
    one = arena(plums(6))
    page, wrong = opened(browser, one.links["anna"])
    press(page, better(page))
    expect(page.locator("#number")).to_have_text("pair 2")
    before = page.locator("#prompt").inner_text()
    press(page, "ArrowLeft")
    page.keyboard.press("u")
    expect(page.locator("#status")).to_contain_text("Taken back")
    expect(page.locator("#prompt")).to_have_text(before)
    page.keyboard.press("1")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("r")
    page.keyboard.type("half a reas")
    page.reload()
    expect(page.locator("#prompt")).to_have_text(before)
    expect(page.locator("#reason")).to_have_value("half a reas")
    assert page.get_by_role("button", name="helpfulness: B is better").get_attribute("aria-pressed") == "true"
    page.wait_for_timeout(READ_MS)
    page.keyboard.down("ArrowRight")
    for _ in range(20):
        page.keyboard.down("ArrowRight")  # a key that is held down repeats
    expect(page.locator("#number")).to_have_text("pair 3")
    page.keyboard.up("ArrowRight")
    page.reload()
    expect(page.locator("#number")).to_have_text("pair 3")
    undoing: list[Route] = []
    page.route("**/api/undo", lambda route: undoing.append(route))  # held back until the key was pressed twice
    page.keyboard.press("u")
    page.keyboard.press("u")
    expect(page.locator("#status")).to_have_text("Taking it back…")
    undoing[0].continue_()
    expect(page.locator("#prompt")).to_have_text(before)
    expect(page.locator("#status")).to_contain_text("Taken back")
    assert len(undoing) == 1
    made = [label for label in one.labels.of(STAGE, undone=True) if label.person == "anna"]
    assert [bool(label.undone_at) for label in made] == [False, True, True]
    assert made[2].reason == "half a reas"
    assert wrong == []
    page.context.close()


def test_two_people_at_once_and_what_the_owner_sees(browser, arena):
    one = arena(plums(4), ("anna", "bo"), target=Target(per_item=2), people={"leave_out": ["bo"]})
    (anna, wrong), (bo, wrong_too) = (opened(browser, one.links[name]) for name in ("anna", "bo"))
    for _ in range(4):
        for page in (anna, bo):
            press(page, better(page))
    assert bo.get_by_role("link", name="People").count() == 0
    for page in (anna, bo):
        assert page.locator("#progress-mine").inner_text() == "yours 4"
    anna.get_by_role("link", name="People").click()
    expect(anna.locator("#people-rows tr")).to_have_count(2)
    rows = anna.locator("#people-rows th")
    assert rows.all_inner_texts() == ["anna", "bo labels do not count"]
    row = anna.locator("#people-rows tr", has_text="bo")
    assert row.locator("td").first.inner_text() == "4"
    assert re.fullmatch(r"\d+\.\d s", row.locator("td").nth(1).inner_text())
    assert anna.locator("#alphas dd").first.inner_text() == "1.00"  # per_item has shown them the same pairs
    anna.keyboard.press("ArrowLeft")  # no pair is on the screen
    assert len(one.of("anna")) == 4
    assert wrong == wrong_too == []
    for page in (anna, bo):
        page.context.close()


def test_offline_for_a_moment(browser, arena):
    one = arena(plums(6))
    page, _ = opened(browser, one.links["anna"])
    context: BrowserContext = page.context
    page.wait_for_timeout(READ_MS)
    context.set_offline(True)
    page.keyboard.press(better(page))
    banner = page.get_by_role("alert")
    expect(banner).to_contain_text("Offline")
    expect(banner).to_contain_text("1 choice waits")
    expect(page.locator("#status")).to_have_text("Not saved yet")
    page.keyboard.press("t")  # the pair has its answer
    assert one.of("anna") == []
    context.set_offline(False)
    expect(page.locator("#status")).to_contain_text("✓ Saved")
    expect(banner).to_be_hidden()
    assert [one.said(label).split(" (")[0] for label in one.of("anna")] == [GOOD]

    def lose(route: Route) -> None:
        route.fetch()  # it arrives, and its answer does not
        route.abort()

    page.evaluate(REMEMBER)
    for path, done in (("label", "✓ Saved"), ("undo", "Taken back")):
        page.wait_for_timeout(READ_MS)
        page.evaluate("delete document.body.dataset.said")
        context.route(f"**/api/{path}", lose, times=1)
        page.keyboard.press("ArrowLeft" if path == "label" else "u")
        expect(page.locator("body")).to_have_attribute("data-said", re.compile("1 choice waits"))
        expect(page.locator("#status")).to_contain_text(done)
    assert [bool(label.undone_at) for label in one.labels.of(STAGE, undone=True)] == [False, True]

    page.wait_for_timeout(READ_MS)
    context.route("**/api/label", lambda route: route.abort())
    page.keyboard.press("b")
    expect(page.locator("#status")).to_have_text("Not saved yet")
    page.reload()
    expect(page.locator("#status")).to_have_text("Not saved yet")  # the browser has kept it
    context.unroute("**/api/label")
    expect(page.locator("#status")).to_contain_text("✓ Saved: both bad")
    assert [label.choice for label in one.of("anna")][1:] == ["bad"]
    context.close()


@pytest.mark.parametrize("width", [390, 1440])
def test_it_lies_on_the_screen_and_text_stands_out(browser, arena, width):
    turns = [{"role": role, "content": f"{role} says {HOSTILE}"} for role in ("system", "user", "assistant", "user")]
    items = [item(turns, [HOSTILE, CODE]), item("لماذا سقط البرقوق؟", [ARABIC, LONG])]
    one = arena(items, target=Target(labels=1))
    page, wrong = opened(browser, one.links["anna"], width)
    seen = ""
    for _ in items:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(TOO_WIDE) == []
        boxes = []
        for side in ("left", "right"):
            shown = page.locator(f"#{side}")
            seen += shown.inner_text()
            assert shown.get_attribute("dir") == ("rtl" if "الترتيب" in shown.inner_text() else "ltr")
            box = shown.bounding_box()
            assert box and box["height"] < 560  # a long one scrolls by itself
            boxes.append(box)
            long = shown.evaluate("one => one.scrollHeight > one.clientHeight + 4")
            assert shown.locator("..").locator(".whole").is_visible() == long
        assert (boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]) == (width == 390)
        choice = page.get_by_role("button", name="A is better", exact=True).bounding_box()
        assert choice and choice["y"] + choice["height"] <= 900  # in sight, however long the replies are
        for key in ("1", "ArrowLeft", "2", "ArrowRight", "3", "t", "4"):
            page.keyboard.press(key)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found = page.evaluate(COLOURS)
            assert (max(found[0][2]) < 60) == (scheme == "dark") and len(found) > 30
            for what, ink, ground in found:
                assert contrast(ink, ground) >= 4.5, (scheme, what, ink, ground)
        press(page, "Escape", "ArrowLeft")
    assert all(text in seen for text in (HOSTILE, "unique", ARABIC.split("`")[2], "Step 59"))
    expect(page.get_by_role("heading", name="Nothing is left for you")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() == "support-bot · label"
    assert wrong == []
    page.context.close()


def test_a_long_reply_is_read_by_keyboard(browser, arena):
    one = arena([item("Where is the lake?", [LONG, LONG + " There."])])
    page, _ = opened(browser, one.links["anna"])
    page.wait_for_timeout(READ_MS)
    page.locator("#left").focus()
    page.keyboard.press("ArrowDown")  # scrolls, and is no choice
    # A function: the page's Content-Security-Policy forbids to evaluate text again and again.
    page.wait_for_function("() => document.querySelector('#left').scrollTop > 0")
    page.keyboard.press("x")
    assert page.locator("#left").evaluate("one => one.scrollHeight <= one.clientHeight + 4")
    assert page.locator("#right").evaluate("one => one.scrollHeight <= one.clientHeight + 4")
    assert one.of("anna") == []
    page.keyboard.press("?")
    assert page.get_by_role("dialog", name="Keys").is_visible()
    page.keyboard.press("ArrowLeft")
    page.get_by_role("checkbox", name=re.compile("Single keys")).uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("t")
    time.sleep(0.2)
    assert one.of("anna") == []
    page.get_by_role("button", name="Tie", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Nothing is left for you")).to_be_visible()
    assert [label.choice for label in one.of("anna")] == ["tie"]
    page.context.close()


def test_what_a_screen_reader_is_told(browser, arena):
    one = arena(plums(4), target=Target(labels=2))
    page, _ = opened(browser, one.links["anna"])
    press(page, "ArrowLeft")
    tree = page.locator("body").aria_snapshot()
    for line in (
        '- heading "support-bot" [level=1]', '- progressbar "1 of 2 labels"', '- region "Prompt"', '- region "Reply A"',
        '- heading "Reply A" [level=2]', '- region "Reply B"', '- heading "Which reply is better?" [level=2]',
        '- button "A is better"', '- button "Tie"', '- button "Both bad"', '- button "B is better"', '- button "Skip"',
        '- button "Undo"', '- group "helpfulness"', '- region "What it has learnt"', "- main", "- banner",
        '- navigation "Views"', '- slider "β, the price of KL"', '- meter "KL from the base"',
    ):  # fmt: skip
        assert line in tree, (line, tree)
    status = page.get_by_role("status")
    assert status.get_attribute("aria-live") == "polite"
    heard = status.inner_text()
    for words in ("Saved: A is better", "1 of 2 labels", "You said A is better", "Pair 2 is shown"):
        assert words in heard
    nameless = "() => [...document.querySelectorAll('button, input, textarea, a')].filter(e => e.checkVisibility() &&"
    nameless += " !(e.ariaLabel ?? e.labels?.[0]?.textContent ?? e.textContent).trim()).map(e => e.outerHTML)"
    assert page.evaluate(nameless) == []
    stops = []
    for _ in range(26):
        page.keyboard.press("Tab")
        stops.append(
            page.evaluate(
                "(() => { const one = document.activeElement, style = getComputedStyle(one);"
                "return [one.innerText || one.id, style.outlineStyle, style.outlineWidth]; })()"
            )
        )
    assert {"A is better", "Tie", "B is better"} <= {re.sub(r"[←↑→\s]+", " ", text).strip() for text, *_ in stops}
    assert [stop for stop in stops if stop[1] == "none" or stop[2] == "0px"] == []
    page.context.close()
