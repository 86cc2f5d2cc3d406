"""The report on a recipe's data on the terminal, readable without colour too."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlhf_pipeline import kinds
from rlhf_pipeline.rundir.words import printable
from rlhf_pipeline.terminal.tables import columns

MOST_TOKENS = 120  # of a stretch of an example: where it is longer, its middle is left out
NEWLINE = "\n"
REPLIES = ("chosen", "rejected", "good", "bad")  # in an example
LIMITS = {"prompt": "max_prompt_length"}  # of replies, max_completion_length
LEFT_OUT = {
    "bad_rows": "bad rows",
    "too_long": "too long",
    "rows_without_pair": "without a pair",
    "bad_replies": "with a bad reply alone",
    "not_trained": "with replies of weight 0 alone",
}
TEMPLATES = {
    "own": "the model's chat template",
    "recipe": "the recipe's chat template",
    "default": "a plain default, for want of a chat template",
}


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report, from `stages.check.data_report`, without its errors and warnings."""
    for stage in report["stages"]:
        for key in kinds.DATA_KEYS:
            if stage[key] is not None:
                _show_table(f"{stage['name']}.{key}", stage[key], console)


def _show_table(title: str, numbers: dict[str, Any], console: Console) -> None:
    console.print(Text(title, style="bold"), soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, fact in _facts(numbers):
        facts.add_row(Text(name, style="dim"), fact)
    console.print(Padding(facts, (0, 0, 0, 2), expand=False))
    console.print(Padding(_lengths(numbers), (1, 0, 1, 2), expand=False))
    if numbers["example"]:
        console.print(Padding(_example(numbers), (0, 0, 1, 2), expand=False))


def _facts(numbers: dict[str, Any]) -> list[tuple[str, str | Text]]:
    rows, held_out = numbers["rows"], numbers["held_out_rows"]
    kept = "" if held_out is None else f", {held_out:,} held out"
    facts: list[tuple[str, str | Text]] = []
    for source in numbers["sources"]:
        facts.append(("from", Text(_named(source))))
        facts.append(("read as", Text(source["says"])))
        facts.append(("columns", Text(columns(source["used_as"]).removeprefix("columns: "))))
    if numbers["eval_source"]:
        facts.append(("held out", Text(_named(numbers["eval_source"]))))
    facts.append(("rows", f"{rows:,}{kept}; {numbers['prompts']:,} distinct prompts"))
    left_out = [f"{count:,} {LEFT_OUT.get(name, name)}" for name, count in numbers["left_out"].items()]
    if left_out:
        facts.append(("not used", ", ".join(left_out)))
    if numbers["labels"]:
        good, bad = numbers["labels"]["good"], numbers["labels"]["bad"]
        facts.append(("labels", f"{_share(good, good + bad)} good, {_share(bad, good + bad)} bad"))
    if numbers["loss"] == "all":
        facts.append(("learned", f"all of the assistant's turns: {numbers['replies']['count']:,} replies"))
    loss = numbers["loss_tokens"]
    facts.append(("tokens", f"{numbers['tokens']:,}" + ("" if loss is None else f", {loss:,} of them carry loss")))
    facts.append(("prompts are", _format(numbers)))
    repeated = numbers["duplicates"]["rows"]
    facts.append(("repeated rows", _share(repeated, rows)))
    if numbers["both_sides"] and numbers["both_sides"]["prompts"]:
        facts.append(("on both sides", f"{numbers['both_sides']['prompts']:,} prompts"))
    pairs = numbers["pairs"]
    if pairs and pairs["length_accuracy"] is not None:
        correlation = pairs["length_correlation"]
        facts.append(("equal replies", _share(numbers["equal_pairs"], rows)))
        facts.append(
            (
                "length",
                f"the chosen reply is longer in {pairs['chosen_longer']:.0%} of the pairs, shorter in "
                f"{pairs['rejected_longer']:.0%}; correlation of length with being chosen "
                + ("none" if correlation is None else f"{correlation:+.2f}"),
            )
        )
    return facts


def _named(source: dict[str, Any]) -> str:
    """A source with what the recipe says of it."""
    said = {name: source[name] for name in ("subset", "revision", "limit", "weight") if source[name] is not None}
    if source["split"] != "train":
        said["split"] = source["split"]
    if source["columns"]:
        said["columns"] = ", ".join(f"{expected}: {theirs}" for expected, theirs in source["columns"].items())
    path = Path(source["path"])
    here = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else source["path"]
    return here + (f" ({'; '.join(f'{name} {value}' for name, value in said.items())})" if said else "")


def _format(numbers: dict[str, Any]) -> str:
    turns, rows = numbers["conversations"], numbers["rows"] + (numbers["held_out_rows"] or 0)
    if not turns:
        return "text, as the model reads it"
    template = TEMPLATES[numbers["chat_template"]]
    some = "conversations" if turns >= rows else f"in part ({turns:,}) conversations"
    return f"{some}, through {template}"


def _lengths(numbers: dict[str, Any]) -> Table:
    """Percentiles in tokens, before any cut, and what the limits do."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tokens")
    for column in ("p50", "p90", "p99", "max"):
        table.add_column(column, justify="right")
    table.add_column("limit")
    for name, lengths in numbers["lengths"].items():
        key = LIMITS.get(name, "max_completion_length")
        limit, cut = numbers["limits"][key], numbers["cut"][name]
        effect = "" if limit is None else f"{key} {limit:,}: {_share(cut, numbers['rows'])} cut"
        if name == "prompt" and kinds.get(numbers["kind"]).samples:
            effect += f"{'; ' if effect else ''}a reply has up to {numbers['limits']['response_length']:,}"
        what = "longest reply" if name == "reply" and numbers["loss"] == "all" else name
        table.add_row(what, *(f"{lengths[column]:,}" for column in ("p50", "p90", "p99", "max")), effect)
    if numbers["limits"]["max_length"] is not None:
        done = [
            f"{_share(count, numbers['rows'])} {word}"
            for word, count in (("cut", numbers["max_length"]["cut"]), ("left out", numbers["max_length"]["left_out"]))
            if count
        ]
        limit = f"max_length {numbers['limits']['max_length']:,}: {', '.join(done) or 'nothing cut'}"
        table.add_row("together", "", "", "", "", limit)
    return table


def _example(numbers: dict[str, Any]) -> Text:
    """The first row as its trainer sees it, every token that carries loss in [brackets]."""
    example, kind = numbers["example"], kinds.get(numbers["kind"])
    text = Text()
    text.append(kind.example, "dim")
    for name in [name for name in ("text", *REPLIES, "prompt") if name in example]:
        text.append(f"\n{name}:\n" if name in REPLIES else "\n", "dim")
        shown = example[name]
        marked = [loss or i == shown.get("score_at") for i, loss in enumerate(shown["loss"])]
        text.append_text(_stretches(shown["tokens"], marked))
    if kind.samples:
        stop = f", until {example['stop_token']}" if example["stop_token"] is not None else ""
        text.append(f"[up to {numbers['limits']['response_length']} tokens{stop}]", "bold green")
    return text


def _stretches(tokens: list[str], marked: list[bool]) -> Text:
    """Tokens as text, the marked ones in brackets of their own; of a long stretch, beginning and end."""
    text, start = Text(), 0
    while start < len(tokens):
        end = next((i for i in range(start, len(tokens)) if marked[i] != marked[start]), len(tokens))
        stretch = [printable(token) for token in tokens[start:end]]
        if len(stretch) > MOST_TOKENS:
            half = MOST_TOKENS // 2
            parts: list[list[str]] = [stretch[:half], stretch[-half:]]
        else:
            parts = [stretch]
        for i, part in enumerate(parts):
            if i:
                text.append(f" … {len(stretch) - MOST_TOKENS:,} more tokens … ", "dim")
            if not marked[start]:
                text.append("".join(part))
            for token in part if marked[start] else []:
                text.append(f"[{token.replace(NEWLINE, '↵')}]", "bold green")
                text.append(NEWLINE * token.count(NEWLINE))
        start = end
    return text


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if count and total else f"{count:,}"
