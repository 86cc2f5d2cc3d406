"""A run as it goes, on a terminal or in plain lines, rendered from its directory alone. No torch."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.text import Text

from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.report import alarms
from rlhf_pipeline.rundir.layout import LOG, RunDirectory
from rlhf_pipeline.rundir.secrets import redact
from rlhf_pipeline.rundir.strict_json import is_number
from rlhf_pipeline.rundir.words import duration, one_line, printable, short
from rlhf_pipeline.terminal.alarms import show_alarms, style_of
from rlhf_pipeline.terminal.console import Console
from rlhf_pipeline.terminal.tables import STYLES
from rlhf_pipeline.terminal.watching import RunView, StageView

REFRESH_S = 0.5  # of the display
PLAIN_EVERY_S = 30.0  # between plain lines
SAMPLE_S = 8.0  # before another sample is shown
SAMPLE_LINES = 3  # of a prompt, and of a reply
TREND = 30  # characters; more where there is room
LONGEST_TREND = 60
LONGEST_TEXT = 2000  # characters of a prompt or a reply that are looked at

Say = Callable[[str], None]


@contextlib.contextmanager
def following(
    run: Path,
    say: Say,
    *,
    recipe: Recipe | None = None,
    locked: Callable[[], bool] | None = None,
    verbose: bool = False,
) -> Iterator[Say]:
    """Show a run while the body goes on: on a terminal as a display, else as a plain line now and then.

    Nothing that goes wrong in it reaches the body.

    Args:
        run: the run directory; it need not be there yet.
        say: takes a line, for standard error.
        recipe: the run's; see `RunView`.
        locked: whether the run goes on; see `RunView`.
        verbose: stream what the stages log instead.

    Yields:
        What takes the body's own lines meanwhile; they come above the display.
    """
    console = Console(stderr=True)
    view = RunView(run, recipe, locked)
    shown: _Log | _Screen | _Plain
    if verbose:
        shown = _Log(view, say)
    elif sys.stderr and sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
        shown = _Screen(view, console, say)
    else:
        shown = _Plain(view, say)
    over = threading.Event()

    def keep_on() -> None:
        while not over.wait(REFRESH_S):
            try:
                shown.refresh()
            except (
                Exception
            ):  # a disk or a terminal that is gone, or a fault of ours: the run continues without the display
                shown.close()
                return

    thread = threading.Thread(target=keep_on, daemon=True)
    thread.start()
    try:
        yield shown.say
    finally:
        over.set()
        thread.join(timeout=2.0)  # a disk that hangs must not hold up the end
        shown.close()


def watch(run: Path, say: Say, console: Console, *, verbose: bool = False) -> None:
    """Show a run that another process, perhaps on another machine, is working on, until it ends; then its final state.

    Args:
        run: the run directory; where it is not there yet, the run is waited for.
        say: takes a line, for standard error.
        console: where to print the final state.
        verbose: stream what the stages log instead.
    """
    directory = RunDirectory(run)
    try:
        if not directory.lock.file.exists() and not directory.begun():
            say(f"there is no run in {run} yet: waiting for one to begin; Ctrl-C leaves")
            while not directory.is_locked():
                time.sleep(0.1)
    except KeyboardInterrupt:
        return
    lock = _Held(directory)
    watched = lock()
    if watched:
        try:
            with following(run, say, locked=lock, verbose=verbose):
                while lock():
                    time.sleep(0.1)
        except KeyboardInterrupt:
            say("no longer watching; the run continues")
            return
    view = RunView(run, locked=lambda: False)
    view.refresh()
    view.alarms = []  # they are shown in full, those of all stages
    console.print(Display(view))
    if any(stage.record.model_fields_set for stage in view.stages):
        show_alarms(alarms.read(run), console)
    say(f"the run in {run} has ended" if watched else f"nothing is running in {run}")


class _Held:
    """Whether a run is going on, looked up once a second."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.last: tuple[float, bool] | None = None

    def __call__(self) -> bool:
        now = time.monotonic()
        if self.last is None or now - self.last[0] > 1.0:
            self.last = now, self.directory.is_locked()
        return self.last[1]


class _Screen:
    """A display at the foot of a terminal, drawn again and again."""

    def __init__(self, view: RunView, console: Console, say: Say) -> None:
        self.view, self.console, self.plainly = view, console, say
        self.live: Live | None = None
        self.lock = threading.Lock()
        self.closed = False

    def refresh(self) -> None:
        self.view.refresh()
        # Made here and now: it is drawn again whenever a line is said, from another thread.
        lines = Group(*Display(self.view).lines(self.console, self.console.options))
        with self.lock:
            if self.closed:
                return
            if self.live is None:
                # What goes to standard output is data, and perhaps goes elsewhere.
                self.live = Live(console=self.console, auto_refresh=False, transient=True, redirect_stdout=False)
                self.live.start()
            self.live.update(lines, refresh=True)

    def say(self, line: str) -> None:
        try:
            self.console.print(Text(line), soft_wrap=True)
        except Exception:  # a terminal that was closed must not end a run
            self.plainly(line)

    def close(self) -> None:
        with self.lock:
            live, self.live, self.closed = self.live, None, True
        if live:
            with contextlib.suppress(Exception):
                live.stop()


class _Plain:
    """A line now and then, if something has moved."""

    def __init__(self, view: RunView, say: Say) -> None:
        self.view, self.say = view, say
        self.stage: StageView | None = None
        self.due = 0.0
        self.last: tuple[str, int] | None = None
        self.doing: str | None = None
        self.alarms: list[alarms.Alarm] = []

    def refresh(self) -> None:
        self.view.refresh()
        if self.view.doing not in (None, self.doing):
            self.say(one_line(str(self.view.doing)))
        self.doing = self.view.doing
        now, stage = time.monotonic(), self.view.at_work
        if self.view.alarms != self.alarms:
            self.alarms = self.view.alarms
            if self.alarms:
                self.say(one_line(alarms.verdict(self.alarms)))
        if stage is not self.stage:
            self.stage, self.due, self.last = stage, now + PLAIN_EVERY_S, None
        elif stage and now >= self.due and (stage.phase, stage.step) != self.last:
            self.due, self.last = now + PLAIN_EVERY_S, (stage.phase, stage.step)
            self.say(plain_line(stage))

    def close(self) -> None:
        pass


class _Log:
    """What a stage at work writes to its log, as it comes."""

    def __init__(self, view: RunView, say: Say) -> None:
        self.view, self.say = view, say
        self.stage: StageView | None = None
        self.read = {stage.name: self._size(stage) for stage in view.stages}
        self.rest = ""

    def refresh(self) -> None:
        before = self.stage
        self.view.refresh()
        self.stage = self.view.at_work
        if before and before is not self.stage:
            self._show(before)
        if self.stage:
            self._show(self.stage)

    def _show(self, stage: StageView) -> None:
        """Say the lines that are new; of a line that goes on, what there is when the stage ends."""
        size = self._size(stage)
        start = min(self.read.get(stage.name, 0), size)  # a log may be replaced, without its secrets or by a new one
        self.read[stage.name] = size
        if size > start:
            with self._file(stage).open("rb") as file:
                file.seek(start)
                self.rest += file.read(size - start).decode("utf-8", "replace")
        *lines, self.rest = self.rest.replace("\r", "\n").split("\n")
        if stage is not self.view.at_work:
            lines, self.rest = [*lines, self.rest], ""
        for line in lines:
            if line.strip():
                self.say(printable(redact(line)))

    def _file(self, stage: StageView) -> Path:
        return self.view.directory.stage(stage.name) / LOG

    def _size(self, stage: StageView) -> int:
        try:
            return self._file(stage).stat().st_size
        except OSError:
            return 0

    def close(self) -> None:
        with contextlib.suppress(Exception):
            if self.stage:
                self.view.at_work = None
                self._show(self.stage)
                self.stage = None


def plain_line(stage: StageView) -> str:
    """A stage at work on one line: how far it is, and its numbers."""
    return ": ".join(filter(None, [f"{stage.name:<7} {_how_far(stage)}", ", ".join(_numbers(stage))]))


class Display:
    """A run as lines of a terminal: its stages, and of one at work how far it is, its numbers, and a sample.

    Args:
        view: the run.
        now: Unix seconds, which choose the sample.
    """

    def __init__(self, view: RunView, now: float | None = None) -> None:
        self.view = view
        self.now = time.time() if now is None else now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines."""
        yield from self.lines(console, options)

    def lines(self, console: Console, options: ConsoleOptions) -> list[Text]:
        """The lines; never wider than the terminal, nor more than it has."""
        width = options.max_width
        height = options.size.height - 1 if console.is_terminal else 1000
        lines = self._lines(width, height, _Signs(options.encoding))
        for line in lines:
            line.truncate(width, overflow="crop")
            line.no_wrap = True
        return lines

    def _lines(self, width: int, height: int, signs: "_Signs") -> list[Text]:
        stage = self.view.at_work
        stages = [self._stage(one, width, signs) for one in self.view.stages]
        found = self.view.alarms
        verdict = signs.fit(f" {one_line(alarms.verdict(found))}", width)
        said = [Text(verdict, style=style_of(found))] if found else []
        if stage is None:
            doing = [Text(signs.fit(f"  {one_line(self.view.doing)}", width))] if self.view.doing else []
            said = said if height > len(doing) + 1 else []
            return [*(_around(stages, 0, height - len(said) - len(doing), signs) if stages else []), *said, *doing]
        work = [_bar(stage, width, signs), *_trends(stage, width, signs)]
        sample = _sample(stage, width, signs, self.now)
        if height < len(work) + 3:
            return work[: max(height, 1)]
        if height < len(stages) + len(said) + len(work) + len(sample) + 2:
            sample = []
        if height < len(said) + len(work) + 3:
            said = []
        stages = _around(stages, self.view.stages.index(stage), height - len(said) - len(work) - 1, signs)
        return [*stages, *said, Text(), *work, *([Text(), *sample] if sample else [])]

    def _stage(self, stage: StageView, width: int, signs: "_Signs") -> Text:
        word = self.view.word(stage)
        current = stage is self.view.at_work
        # A stage that was killed left the time of when it began.
        wall_s = stage.elapsed if current else None if stage.record.state == "running" else stage.record.wall_s
        style = "cyan" if current else STYLES.get(word, "dim")
        line = Text(" ")
        names = max(len(one.name) for one in self.view.stages)
        line.append(f"{signs.of_state(stage.state, current)} ", style=style)
        line.append(f"{signs.fit(stage.name, min(names, 24)):<{min(names, 24)}}  ", style="bold" if current else "")
        line.append(f"{word:<{max(9, *(len(self.view.word(one)) for one in self.view.stages))}}  ", style=style)
        time_of = duration(round(wall_s) if current and wall_s is not None else wall_s)
        line.append(f"{time_of:>12}   ")
        about = ""
        if stage.state == "done":
            about = "   ".join(f"{name} {value}" for name, value in stage.final.items())
        elif not current and stage.state != "missing":
            about = one_line(stage.reason)
        line.append(signs.fit(about, width - line.cell_len), style="dim")
        return line


class _Signs:
    """The characters that a terminal can show."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        self.plain = not encoding.lower().startswith("utf")
        self.levels = "_.-=+*#" if self.plain else "▁▂▃▄▅▆▇"  # none that meets the line above
        self.bar = ("#", "-") if self.plain else ("━", "─")
        self.more = "..." if self.plain else "…"
        self.none = "-" if self.plain else "\N{EN DASH}"

    def of_state(self, state: str, current: bool) -> str:
        """One character for a stage's state."""
        done, waits = ("+", ".") if self.plain else ("✓", "·")
        signs = {"done": done, "missing": waits, "blocked": waits, "waiting": waits}
        at_work, other = (">", "x") if self.plain else ("▸", "✗")
        return at_work if current else signs.get(state, other)

    def fit(self, text: str, width: int) -> str:
        """`text` in characters of the terminal, cut at its end where it is too wide."""
        if self.plain:
            text = text.replace("\N{MINUS SIGN}", "-").replace("±", "+-")
        text = text.encode(self.encoding, "replace").decode(self.encoding)
        if cell_len(text) <= width:
            return text
        kept = max(width - len(self.more), 0)
        return (set_cell_size(text, kept) + self.more)[: max(width, 0)]

    def trend(self, values: Sequence[float], width: int) -> str:
        """The last values as one character each, from their lowest to their highest."""
        shown = list(values)[-width:] if width > 0 else []
        if not shown:
            return ""
        low, high = min(shown), max(shown)
        if high == low:
            return self.levels[0] * len(shown)
        top = len(self.levels) - 1
        return "".join(self.levels[round((value / 2 - low / 2) / (high / 2 - low / 2) * top)] for value in shown)


def _bar(stage: StageView, width: int, signs: _Signs) -> Text:
    """How far a stage at work is."""
    line = Text("  ")
    how_far = _how_far(stage, signs.none)
    told = [f"{stage.name}: {how_far}", how_far, how_far.split(",")[0]]
    if not stage.of:
        line.append(signs.fit(told[0], width - 2))
        return line
    said = next((text for text in told if len(text) + 16 <= width), told[-1])
    room = min(width - len(said) - 6, 60)
    if room >= 5:
        done = round(min(stage.step / stage.of, 1.0) * room)
        line.append(signs.bar[0] * done, style="cyan").append(signs.bar[1] * (room - done), style="dim").append("  ")
    line.append(signs.fit(said, width - line.cell_len))
    return line


def _how_far(stage: StageView, unknown: str | None = None) -> str:
    """The step, the share and the time left; of an ensemble the step of the member at work.

    Args:
        stage: at work.
        unknown: shown until the pace is known; None to leave it out.
    """
    if stage.phase in ("starting", "loading") or stage.phase.startswith("waiting"):
        return stage.phase
    step = f"{'step' if stage.phase == 'training' else stage.phase} {stage.step}"
    member = f" of member {stage.member[0]}/{stage.member[1]}" if stage.member else ""
    if not stage.of:
        return step + member
    left = unknown if stage.left is None else duration(_rounded(stage.left))
    return f"{step}/{stage.of}{member}, {stage.step / stage.of:.0%}" + (f", {left} left" if left else "")


def _rounded(seconds: float) -> float:
    """A time that is estimated, without digits that would change all the time."""
    unit = 60 if seconds >= 300 else 10 if seconds >= 60 else 1
    return round(seconds / unit) * unit


def _numbers(stage: StageView) -> list[str]:
    return [f"{name} {_value(stage, name)}" for name in stage.logged if stage.values.get(name)]


def _value(stage: StageView, name: str) -> str:
    """The last value of a number; the KL with what bounds it."""
    of = f" of {short(stage.bound_of_kl)}" if stage.logged[name] == "objective/kl" and stage.bound_of_kl else ""
    return short(stage.values[name][-1]) + of


def _trends(stage: StageView, width: int, signs: _Signs) -> list[Text]:
    """A line for each number: its name, its last value, and how it went."""
    names = [name for name in stage.logged if stage.values.get(name)]
    values = {name: _value(stage, name) for name in names}
    widest = max((len(name) for name in names), default=0)
    widest_value = max(6, *(len(value) for value in values.values())) if values else 0
    room = width - 2 - widest - 2 - widest_value - 3
    length = LONGEST_TREND if room >= LONGEST_TREND + 20 else min(TREND, room)
    lines = []
    for name in names:
        line = Text("  ")
        line.append(f"{name:<{widest}}  ", style="dim")
        line.append(f"{signs.fit(values[name], width):<{widest_value}}   ", style="bold")
        line.append(signs.trend(stage.values[name], length), style="cyan")
        lines.append(line)
    return lines


def _sample(stage: StageView, width: int, signs: _Signs, now: float) -> list[Text]:
    """A prompt and a reply of the latest step that has some, others of it by turns."""
    if not stage.samples or width < 30:
        return []
    row = stage.samples[int(now / SAMPLE_S) % len(stage.samples)]
    facts = [f"step {row['step']}"] if isinstance(row.get("step"), int) else []
    facts += [f"{name} {short(row[name])}" for name in ("score", "kl", "judge") if is_number(row.get(name))]
    facts += ["did not end"] if row.get("ended") is False else []
    lines = [Text("  ").append(signs.fit("a sample: " + ", ".join(facts), width - 2), style="dim")]
    for name, text in (("prompt", _words_of(row.get("prompt"))), ("reply", _words_of(row.get("completion")))):
        for i, part in enumerate(_wrapped(text, width - 10, signs)):
            line = Text("  ").append(f"{name if i == 0 else '':<8}", style="dim")
            lines.append(line.append(part, style="" if name == "reply" else "dim"))
    return lines


def _words_of(text: Any) -> str:
    """A prompt or a reply on one line; of a chat, its last turns."""
    if isinstance(text, list):
        turns = [turn for turn in text if isinstance(turn, dict)]
        text = " / ".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)[-LONGEST_TEXT:]
    return one_line(str(text)[:LONGEST_TEXT])


def _wrapped(text: str, width: int, signs: _Signs) -> list[str]:
    """The first lines of a text, at words where that can be."""
    lines: list[str] = []
    rest = signs.fit(text, LONGEST_TEXT * 2)
    while rest and len(lines) < SAMPLE_LINES:
        if len(lines) == SAMPLE_LINES - 1 or cell_len(rest) <= width:
            lines.append(signs.fit(rest, width))
            break
        cut = set_cell_size(rest, width).rstrip()
        cut = cut[: cut.rfind(" ")] if " " in cut and len(rest) > len(cut) and rest[len(cut)] != " " else cut
        lines.append(cut)
        rest = rest[len(cut) :].lstrip()
    return lines or [""]


def _around(lines: list[Text], place: int, height: int, signs: _Signs) -> list[Text]:
    """As many lines as there is room for, among them the one that matters."""
    if len(lines) <= max(height, 1):
        return lines
    room = max(height - 1, 1)
    start = min(max(place - room // 2, 0), len(lines) - room)
    more = Text(f"   {signs.more} {len(lines) - room} more", style="dim")
    return [*lines[start : start + room], more][: max(height, 1)]
