"""Takes the pictures of the documentation again, into docs/images. Needs Chromium.

run.svg, report.png: `rlhf-pipeline run tiny` in the middle of PPO, and the top of its report.
arena.png, arena-dark.png, arena-phone.png: the page of `rlhf-pipeline label` on the run of `tiny-label`, after somebody
who knows its answers has chosen for a while. With `arena` as the only argument, these alone.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.text import Text

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.models.tiny import world
from rlhf_pipeline.terminal.live import Display
from rlhf_pipeline.terminal.watching import RunView

IMAGES = Path(__file__).parent.parent / "docs" / "images"
COLUMNS, LINES = 84, 40
REPORT = {"width": 1320, "height": 1890}
ARENA = {"width": 1360, "height": 1080}
PHONE = {"width": 390, "height": 844}
CHOICES = 110  # before the pictures of the arena are taken
DIMENSIONS = "feedback.dimensions=[helpfulness, honesty, harmlessness, conciseness]"
WAITING = 3  # the exit code of `run` where a stage waits for people
READ_S = 0.3  # a choice sooner after a pair is shown is none


def main() -> None:
    """Run both recipes, and take the pictures."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[1:] != ["arena"]:
        _of_tiny()
    _of_the_arena()


def _of_tiny() -> None:
    """A run on a terminal, and its report."""
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
        command = [sys.executable, "-m", "rlhf_pipeline", "run", "tiny"]
        with (Path(folder) / "said").open("w") as said:
            running = subprocess.Popen(command, cwd=folder, stderr=said, stdout=subprocess.DEVNULL)
        loaded = recipes.load("tiny", [f"output_dir={folder}/runs"])
        view = RunView(loaded.run, loaded, locked=lambda: running.poll() is None)
        while not _is_in_the_middle(view):
            if running.poll() is not None:
                sys.exit(f"the run ended before its middle was seen: {(Path(folder) / 'said').read_text()}")
            time.sleep(0.2)
        _terminal(view, (Path(folder) / "said").read_text().splitlines())
        if running.wait():
            sys.exit("the run failed")
        _report(loaded.run / "report.html")


def _is_in_the_middle(view: RunView) -> bool:
    view.refresh()
    stage = view.at_work
    return bool(stage and stage.name == "ppo" and stage.of and stage.step > stage.of / 2 and stage.samples)


def _terminal(view: RunView, lines: list[str]) -> None:
    """What the terminal shows: the lines so far, and below them the display."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(
            record=True, file=nowhere, width=COLUMNS, height=LINES, force_terminal=True, legacy_windows=False
        )
        console.print(Text("$ rlhf-pipeline run tiny", style="bold"))
        for line in lines:
            if not line.startswith("ppo     step"):  # a plain line, which a terminal does not get
                console.print(Text(line))
        console.print(Display(view))
        console.save_svg(str(IMAGES / "run.svg"), title="rlhf-pipeline run tiny", unique_id="run")


def _report(page: Path) -> None:
    with _browser() as browser:
        tab = browser.new_page(viewport=REPORT)
        tab.goto(page.as_uri())
        tab.screenshot(path=IMAGES / "report.png")


def _of_the_arena() -> None:
    """A run that waits for people, and its page: choose as the gold judge would, then look."""
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
        command = [sys.executable, "-m", "rlhf_pipeline"]
        waits = subprocess.run([*command, "run", "tiny-label", DIMENSIONS], cwd=folder)
        if waits.returncode != WAITING:
            sys.exit(f"the run should wait for people: exit code {waits.returncode}")
        run = str(next(Path(folder, "runs").iterdir()))
        label = [*command, "label", run, "--people", "alice,bob"]
        serving = subprocess.Popen(label, stdout=subprocess.PIPE, text=True)
        assert serving.stdout is not None
        link = next(line.strip() for line in serving.stdout if "?token=" in line).split()[-1]
        try:
            with _browser() as browser:
                tab = browser.new_page(viewport=ARENA)
                tab.goto(link)
                tab.wait_for_selector("#pair")
                chosen = [_choose(tab) for _ in range(CHOICES)]
                while chosen[-1] == "t":
                    chosen.append(_choose(tab))
                tab.wait_for_timeout(600)
                tab.screenshot(path=IMAGES / "arena.png")
                tab.emulate_media(color_scheme="dark")
                tab.screenshot(path=IMAGES / "arena-dark.png")
                tab.emulate_media(color_scheme="light")
                tab.set_viewport_size(PHONE)
                tab.screenshot(path=IMAGES / "arena-phone.png")
        finally:
            serving.send_signal(signal.SIGINT)
            serving.wait()


def _choose(tab: Page) -> str:
    """Press the key of the better reply, wait for the next pair, and say which key it was.

    Truth comes first, and manners second.
    """
    number = tab.locator("#number").inner_text()
    prompt, left, right = (tab.locator(f"#{name}").inner_text().strip() for name in ("prompt", "left", "right"))
    fact = next(question.fact for question in world.questions() if question.prompt == prompt)
    first, second = ((world.is_right(fact, reply), world.is_polite(reply)) for reply in (left, right))
    key = "t" if first == second else "ArrowLeft" if first > second else "ArrowRight"
    time.sleep(READ_S)
    tab.keyboard.press(key)
    tab.wait_for_function("before => document.querySelector('#number').textContent !== before", arg=number)
    return key


@contextmanager
def _browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


if __name__ == "__main__":
    main()
