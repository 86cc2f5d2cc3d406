"""Takes the pictures of README.md again: a run on a terminal in the middle of PPO, and the top of its report.

Runs `rlhf-pipeline run tiny` in a temporary folder, and writes docs/images/run.svg and docs/images/report.png. Needs
Chromium for the second.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.text import Text

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.terminal.live import Display
from rlhf_pipeline.terminal.watching import RunView

IMAGES = Path(__file__).parent.parent / "docs" / "images"
COLUMNS, LINES = 84, 40
REPORT = {"width": 1320, "height": 1890}


def main() -> None:
    """Run it, and take both pictures."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
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
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport=REPORT)
        tab.goto(page.as_uri())
        tab.screenshot(path=IMAGES / "report.png")
        browser.close()


if __name__ == "__main__":
    main()
