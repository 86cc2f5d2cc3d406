"""Policies of a run, or of several, side by side on the terminal, readable without colour and at 80 columns."""

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlhf_pipeline.rundir.words import one_line

SHOWN = 3  # prompts with their replies, where nobody asked for certain ones
MOST_PAIRS = 16  # win rates between runs; of more policies each is held against the best one
MOST_REPLIES = 12  # of several runs, to one prompt
LONGEST = 400  # characters of a prompt or a reply; of a longer prompt the end is shown, of a longer reply the beginning
FORMATS = {"reward": ".2f", "reward_std": ".2f", "judge": ".3f", "kl": ".2f", "tokens": ".1f", "ended": ".0%"}
NAMES = {"kl": "KL", "reward_std": "disagreement", "ai_judge": "AI judge"}  # of measures in what people read


def show(comparison: dict[str, Any], most: int | None, console: Console) -> None:
    """Print a comparison, from `comparison.json`: means, win rates, and the replies to the first `most` prompts."""
    _show_settings(comparison, console)
    _show_means(comparison, console)
    if comparison["win_rates"]:
        console.print()
        _show_win_rates(comparison["win_rates"], len(comparison["rows"]), console)
        _show_ai_judge(comparison, console)
    _show_rows(comparison, most, comparison["policies"], console)


def show_runs(comparison: dict[str, Any], most: int | None, console: Console) -> None:
    """Print what `joined.join` has made of several runs."""
    _show_settings(comparison, console)
    _show_means(comparison, console)
    _show_who_shares(comparison, console)
    pairs, best = _between_runs(comparison)
    rates = [rate for rate in comparison["win_rates"] if (rate["a"], rate["b"]) in pairs and rate["by"] != "ai_judge"]
    if best is not None:
        rates = [_turned(rate) if rate["a"] == best else rate for rate in rates]
    if rates:
        console.print()
        _show_win_rates(rates, len(comparison["rows"]), console)
        if best is not None:
            words = f"{best} has the highest mean of all: being the best of many is partly luck; `--json` has all pairs"
            console.print(Text(words, style="dim"))
    shown = comparison["policies"][:MOST_REPLIES]
    _show_rows(comparison, most, shown, console)
    more = len(comparison["policies"]) - len(shown)
    if more > 0 and comparison["rows"]:
        words = f"\nreplies of {more} more policies are not shown: `--stages` shows some, `--json` prints all"
        console.print(Text(words, style="dim"))


def _show_settings(comparison: dict[str, Any], console: Console) -> None:
    settings, prompts = comparison["settings"], len(comparison["rows"])
    how = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    console.print(
        Text(
            f"{prompts} prompt{'s' * (prompts != 1)} of {one_line(settings['prompts'])}; {how}, "
            f"at most {settings['max_new_tokens']} tokens, seed {settings['seed']}"
        )
    )
    console.print()


def _show_rows(comparison: dict[str, Any], most: int | None, policies: list[str], console: Console) -> None:
    rows = comparison["rows"]
    for row in rows[:most]:
        console.print()
        _show_replies(row, policies, console)
    if most is not None and len(rows) > most:
        console.print(Text(f"\nand {len(rows) - most} more: `--json` prints all", style="dim"))


def _show_who_shares(comparison: dict[str, Any], console: Console) -> None:
    """Of policies that some runs share, and not all, in which runs they are too."""
    runs = comparison["runs"]
    for name in comparison["policies"]:
        having = [run["label"] for run in runs if name in run["policies"].values()]
        if 1 < len(having) < len(runs):
            _, *others = having
            named = ", ".join(others) if len(others) <= 3 else f"{len(others)} more runs"
            console.print(Text(f"{name}: the same in {named}", style="dim"))


def _between_runs(comparison: dict[str, Any]) -> tuple[set[tuple[str, str]], str | None]:
    """Which policies are held against which: those of different runs, or where they are many, each against the best.

    Returns:
        The pairs, and that best one, by the judge's mean, else by the reward's; None where all pairs are there.
    """
    runs = [set(run["policies"].values()) for run in comparison["runs"]]
    shared = {name for name in comparison["policies"] if all(name in run for run in runs)}
    own = [name for name in comparison["policies"] if name not in shared]
    pairs = {
        (a, b) for rate in comparison["win_rates"]
        if (a := rate["a"]) in own and (b := rate["b"]) in own and not any({a, b} <= run for run in runs)
    }  # fmt: skip
    by = "judge" if comparison["judge"] is not None else "reward"
    known = {name: value for name in own if (value := comparison["means"][name][by]) is not None}
    if len(pairs) <= MOST_PAIRS or not known:
        return pairs, None
    best = max(known, key=known.__getitem__)
    return {
        pair for rate in comparison["win_rates"] if best in (pair := (rate["a"], rate["b"])) and {*pair} <= {*own}
    }, best


def _turned(rate: dict[str, Any]) -> dict[str, Any]:
    """The same win rate, of the other one over this one."""
    ends = {"win_rate": 1 - rate["win_rate"], "low": 1 - rate["high"], "high": 1 - rate["low"]}
    return rate | {"a": rate["b"], "b": rate["a"]} | ends


def _show_means(comparison: dict[str, Any], console: Console) -> None:
    of_runs, reference, reward = "runs" in comparison, comparison["reference"], comparison["reward"]
    has_reward = (
        any(means["reward"] is not None for means in comparison["means"].values()) if of_runs else reward is not None
    )
    said = {
        "kl": f"from {'the reference of each run' if reference is None else reference}, in nats a reply",
        "ended": "share of replies that end by themselves",
    }
    if comparison["judge"] is not None:
        said = {"judge": one_line(comparison["judge"]), **said}
    if has_reward:
        of_ensemble = any("reward_std" in means for means in comparison["means"].values())
        members = {"reward_std": "the standard deviation of the members' scores"} if of_ensemble else {}
        mean = ", the mean of its members" if of_ensemble else ""
        whose = "of each run's reward stage" if reward is None else f"of stage {reward}"
        said = {"reward": f"{whose}{mean}", **members, **said}
    measures = [name for name in FORMATS if name in said or name == "tokens"]
    table = _table("policy", *(NAMES.get(measure, measure) for measure in measures))
    for name in comparison["policies"]:
        means = comparison["means"][name]
        table.add_row(name, *(_number(means.get(measure), FORMATS[measure]) for measure in measures))
    console.print(table)
    lines = [f"{NAMES.get(measure, measure)}: {words}" for measure, words in said.items()]
    console.print(Text("means over prompts\n" + "\n".join(lines), style="dim"))


def _show_win_rates(win_rates: list[dict[str, Any]], prompts: int, console: Console) -> None:
    measures = list(dict.fromkeys(rate["by"] for rate in win_rates))
    table = _table("win rate", *(f"by {NAMES.get(measure, measure)}" for measure in measures))
    found = {(rate["a"], rate["b"], rate["by"]): rate for rate in win_rates}
    for a, b in dict.fromkeys((rate["a"], rate["b"]) for rate in win_rates):
        rates = (found.get((a, b, measure)) for measure in measures)
        cells = (
            "" if rate is None else f"{rate['win_rate']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]" for rate in rates
        )
        table.add_row(f"{a} beats {b}", *(Text(cell) for cell in cells))
    console.print(table)
    over = f"over the {prompts} prompts" if prompts > 1 else "over one prompt, which says nothing"
    console.print(Text(f"ties count half; in brackets the 95 % interval {over}", style="dim"))


def _show_ai_judge(comparison: dict[str, Any], console: Console) -> None:
    """Who the AI judge is, and what it favours."""
    if comparison.get("ai_judge") is None:
        return
    figures = comparison["ai_judge_figures"]
    said = [f"AI judge: {one_line(comparison['ai_judge'])}"]
    for name, words in (("first_position", "prefers the reply shown first in"), ("agreement", "agrees with itself in")):
        value = figures.get(f"judge/{name}")
        said += [] if value is None else [f"{words} {value:.2f}"]
    unread = figures.get("judge/unread")
    said += [f"{unread:.2f} of its answers could not be read"] if unread else []
    console.print(Text("; ".join(said), style="dim"))


def _show_replies(row: dict[str, Any], policies: list[str], console: Console) -> None:
    console.print(Text(trimmed(_as_text(row["prompt"]), from_end=True), style="bold"))
    for name in policies:
        reply = row["replies"][name]
        deviation = "" if reply.get("reward_std") is None else f" ± {reply['reward_std']:.2f}"
        said = [] if reply["reward"] is None else [f"reward {reply['reward']:.2f}{deviation}"]
        said += [] if reply["judge"] is None else [f"judge {reply['judge']:.2f}"]
        said += [f"KL {_number(reply['kl'], '.2f')}", f"{reply['tokens']} tokens" + ("" if reply["ended"] else ", cut")]
        heading = Text.assemble((name, "cyan"), ("  " + "  ".join(said), "dim"))
        console.print(Padding(heading, (0, 0, 0, 2), expand=False))
        console.print(Padding(Text(trimmed(reply["text"])), (0, 0, 0, 4), expand=False))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _as_text(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else "  ".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def trimmed(text: str, from_end: bool = False) -> str:
    """A text's beginning, or its end, on one line."""
    text = one_line(text)
    if len(text) <= LONGEST:
        return text or "(empty)"
    return "… " + text[-LONGEST:] if from_end else text[:LONGEST] + " …"


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)
