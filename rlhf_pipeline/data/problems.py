"""What in a stage's data would make its training useless, and what may: errors and warnings from `measure`."""

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_pipeline import kinds
from rlhf_pipeline.data.turns import Prompt
from rlhf_pipeline.errors import InputError

MANY_CUT = 0.1  # shares of rows from which something is worth a warning
MANY_DUPLICATES = 0.05
TOO_MANY_DUPLICATES = 0.5
LENGTH_TELLS = 0.7  # the share of pairs that length alone tells apart


def problems(numbers: dict[str, Any], place: str) -> tuple[list[InputError], list[str]]:
    """What in a stage's data would spoil its training, and what may.

    Args:
        numbers: from `measure`.
        place: the key of the recipe, as `stages.sft.data`.

    Returns:
        Errors, and warnings as sentences.
    """
    return list(_errors(numbers, place)), [f"{place}: {warning}" for warning in _warnings(numbers)]


def _trains(numbers: dict[str, Any]) -> bool:
    """Whether the rows are those of a stage that trains."""
    return kinds.get(numbers["kind"]).trains


def _errors(numbers: dict[str, Any], place: str) -> Iterator[InputError]:
    rows, replies = numbers["rows"], numbers["replies"]
    if not rows:
        yield InputError(f"no rows are left{' to train on' * _trains(numbers)}", place=place)
        return
    if numbers["max_length"]["left_out"] == rows and replies["without_loss"] < rows:
        yield InputError(
            f"none of the {rows:,} rows fits in max_length {numbers['limits']['max_length']}",
            place=place,
            hint="raise it, or shorten the data with `max_prompt_length` and `max_completion_length`",
        )
    elif numbers["held_out_rows"] and numbers["held_out_max_length"]["left_out"] == numbers["held_out_rows"]:
        yield InputError(
            f"none of the {numbers['held_out_rows']:,} held-out rows fits in max_length "
            f"{numbers['limits']['max_length']}",
            place=place,
            hint="raise it, or shorten the data with `max_prompt_length` and `max_completion_length`",
        )
    elif replies["without_loss"] == rows:
        yield InputError(f"all labels of all {rows:,} rows are masked: there is nothing to learn", place=place)
    elif replies["count"] and replies["without_eos"] == replies["count"]:
        yield InputError(
            f"none of the {replies['count']:,} replies ends in EOS as the trainer sees them, so the model would never "
            "learn to end one",
            place=place,
            hint=f"raise `{'` or `'.join(_limits_on_replies(numbers))}`",
        )
    if replies["empty"]:
        what = "chosen replies" if numbers["pairs"] else "replies"
        yield InputError(f"{out_of(replies['empty'], rows)} {what} are empty", place=place, hint="remove these rows")
    if numbers["equal_pairs"] == rows:
        yield InputError(f"in all {rows:,} pairs the two replies are the same", place=place)
    doubles = numbers["duplicates"]["rows"]
    if kinds.get(numbers["kind"]).reads != "prompts" and doubles > TOO_MANY_DUPLICATES * rows:
        yield InputError(
            f"{out_of(doubles, rows)} rows repeat an earlier one",
            place=place,
            hint="remove them; or train for more epochs",
        )


def _warnings(numbers: dict[str, Any]) -> Iterator[str]:
    rows, limits, replies = numbers["rows"], numbers["limits"], numbers["replies"]
    if not rows:
        return
    if rows < numbers["batch"]:
        of = f", which {numbers['processes']} processes share" if numbers["processes"] > 1 else ""
        yield (
            f"{rows} rows are fewer than one batch of {numbers['batch']}{of}: lower `per_device_train_batch_size` or "
            "`gradient_accumulation_steps`, or add rows"
        )
    turns, all_rows = numbers["conversations"], rows + (numbers["held_out_rows"] or 0)
    if 0 < turns < all_rows:
        then = "so the model is trained on two formats" if _trains(numbers) else "which are two formats"
        yield (
            f"the prompts of {out_of(turns, all_rows)} rows are conversations, and the others plain text, {then}: "
            "write all in one; `chat: true` takes text as a user's turn"
        )
    for name, count in numbers["cut"].items():
        if count > MANY_CUT * rows:
            key = "max_prompt_length" if name == "prompt" else "max_completion_length"
            what, then = ("prompts", "lose their beginning") if name == "prompt" else ("replies", "have no EOS")
            what = what if name in ("prompt", "reply") else f"{name} {what}"
            yield f"{out_of(count, rows)} {what} are longer than {key} {limits[key]}, and {then}: {_raise_or_drop(key)}"
    for what, count in numbers["max_length"].items():
        if count > MANY_CUT * rows and not (what == "left_out" and count == rows):  # which is an error
            yield (
                f"{out_of(count, rows)} rows are longer than max_length {limits['max_length']}, and are {said(what)}: "
                "raise it, or set `max_prompt_length` and `max_completion_length`"
            )
    if numbers["beyond_model"]:
        limit = kinds.get(numbers["kind"]).reply_limit
        reply = f" with a reply of {limits['response_length']} tokens" if limit else ""
        yield (
            f"{out_of(numbers['beyond_model'], rows)} rows{reply} are longer than the {limits['max_positions']:,} "
            f"tokens that the model has positions for: set {_limits_on_all(limit)}"
        )
    if replies["without_loss"] and replies["without_loss"] < rows:
        yield (
            f"all labels are masked in {out_of(replies['without_loss'], rows)} rows, so they teach nothing: where the "
            "prompt alone fills `max_length`, set `max_prompt_length`; else remove them"
        )
    yield from _warnings_of_repetition(numbers)
    if numbers["pairs"] and rows >= 20:
        yield from _warnings_of_length(numbers["pairs"])
    if unlike := numbers["unlike_template"]:
        ours, own = where_they_differ(unlike["prompt_and_reply"], unlike["template"])
        yield (
            f"in {unlike['rows']:,} rows prompt and reply are another text than the chat template's own of the whole "
            f"conversation: {ours!r}, and the template's is {own!r}; change the replies, `model.chat_template`, or "
            "what it is told in `model.chat_template_kwargs`"
        )
    if numbers["eos_within"]:
        yield (
            f"in {numbers['eos_within']:,} rows a reply has an EOS before its end, so the model learns to go on after "
            "one: cut such replies there"
        )
    if numbers["foreign_end"]:
        yield (
            f"in {numbers['foreign_end']:,} rows a reply ends in another model's end of text, as `</s>` or "
            f"`<|im_end|>`, which is text to this one and would be learned: remove it; {numbers['end_of_reply']!r} is "
            "put there anyway"
        )
    together = numbers["run_together"]
    if together and together["rows"] > together["of"] / 2:
        yield (
            f"prompt and reply run together, as in {together['example']!r}: end prompts with a space or a line break, "
            "begin replies with a space, or set `chat: true`"
        )
    if numbers["bos_doubled"]:
        yield (
            f"{out_of(numbers['bos_doubled'], rows)} rows begin with BOS twice, as the tokenizer adds one: take it out "
            "of the text"
        )


def _warnings_of_repetition(numbers: dict[str, Any]) -> Iterator[str]:
    rows, doubles, both = numbers["rows"], numbers["duplicates"]["rows"], numbers["both_sides"]
    if kinds.get(numbers["kind"]).reads == "prompts":  # those of preferences have one row for each pair
        if doubles > MANY_DUPLICATES * rows:
            often = out_of(doubles, rows)
            yield f"{often} prompts repeat an earlier one, so they are asked more often; if not meant, remove them"
    elif MANY_DUPLICATES * rows < doubles <= TOO_MANY_DUPLICATES * rows:
        yield f"{out_of(doubles, rows)} rows repeat an earlier one, so they count double: if not meant, remove them"
    if numbers["equal_pairs"] and numbers["equal_pairs"] < rows:
        equal = out_of(numbers["equal_pairs"], rows)
        yield f"in {equal} pairs the two replies are the same, and teach nothing: remove them"
    if both and both["held_out_rows"]:
        share = out_of(both["held_out_rows"], numbers["held_out_rows"])
        yield (
            f"the prompts of {share} held-out rows are trained on too, so evaluation looks too good: hold out other "
            "prompts; `eval_fraction` does"
        )


def _warnings_of_length(pairs: dict[str, Any]) -> Iterator[str]:
    right = pairs["length_accuracy"]
    if not 1 - LENGTH_TELLS < right < LENGTH_TELLS:
        longer = "longer" if right > 0.5 else "shorter"
        yield (
            f"the {longer} reply is the chosen one in {max(right, 1 - right):.0%} of the pairs (correlation of length "
            f"and being chosen {pairs['length_correlation']:+.2f}), so a reward model may learn length alone: add "
            "pairs in which it is the other one"
        )


def across(stages: dict[str, dict[str, Any]], judged_on: Sequence[Prompt] = ()) -> list[str]:
    """Warnings about a recipe's chat template, and about stages that do not fit together.

    Args:
        stages: numbers from `measure` by the stage's name.
        judged_on: the prompts of `evaluate`, if there are any.
    """
    if not stages:
        return []
    turns = [name for name, numbers in stages.items() if numbers["conversations"]]
    text = [name for name in stages if name not in turns]
    one = next(iter(stages.values()))  # all have the same tokenizer
    end, eos, default = one["end_of_turn"], one["end_of_reply"], one["chat_template"] == "default"
    warnings = []
    if turns and text:
        all_train = all(_trains(numbers) for numbers in stages.values())
        then = "so the stages train the model on two formats" if all_train else "which are two formats"
        warnings.append(
            f"the prompts of {_and(turns)} are conversations, and those of {_and(text)} plain text, {then}: write all "
            "in one; `chat: true` in `data` takes text as a user's turn"
        )
    elif judged_on and (odd := sum(isinstance(prompt, list) != bool(turns) for prompt in judged_on)):
        formats = ("plain text", "conversations")
        theirs, ours = formats if turns else formats[::-1]
        advice = "set `chat: true` there if they are a user's turns" if turns else "give them as the stages' are"
        warnings.append(
            f"evaluate.data: the prompts of {out_of(odd, len(judged_on))} rows are {theirs}, and those of "
            f"{_and(turns or text)} {ours}: policies are judged in a format that they were not trained on; {advice}"
        )
    if not turns and text and not default and not all(stages[name]["chat"] is False for name in text):
        warnings.append(
            "the model has a chat template, and all prompts are plain text, which does not go through it: set `chat: "
            "true` in `data` if they are a user's turns, and `chat: false` if not"
        )
    if turns and default:
        warnings.append(
            "the model has no chat template, so turns are written in a plain default: set `model.chat_template` to "
            "have another one (`rlhf-pipeline docs data`)"
        )
    if turns and one["template_day"]:
        warnings.append(
            f"the chat template writes today's date, which would change every score from day to day: it is "
            f"{one['template_day']} in all stages and in what is exported; name a template of your own with "
            "`model.chat_template` to have another one"
        )
    if turns and end and not end.startswith(eos) and any(_trains(numbers) for numbers in stages.values()):
        warnings.append(
            f"the chat template ends the assistant's turns in {end!r}, and the replies that are trained end in EOS, "
            f"{eos!r}: stop generation at that, or make the template's end the tokenizer's `eos_token`"
        )
    return warnings


def where_they_differ(one: str, other: str) -> tuple[str, str]:
    """Two texts around the first place at which they differ."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    begin = max(at - 40, 0)
    around = [("…" if begin else "") + text[begin : at + 40] + "…" * (at + 40 < len(text)) for text in (one, other)]
    return around[0], around[1]


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _raise_or_drop(key: str) -> str:
    return f"raise `{key}`, or leave such rows out with `too_long: drop`"


def _limits_on_all(reply_limit: str | None) -> str:
    if reply_limit:
        return f"`max_prompt_length`, or lower `{reply_limit}`"
    return "`max_prompt_length` and `max_completion_length`"


def said(what: str) -> str:
    """What `max_length` does, in words."""
    return {"cut": "cut there", "left_out": "left out"}[what]


def _limits_on_replies(numbers: dict[str, Any]) -> list[str]:
    keys = [key for key in ("max_completion_length", "max_length") if numbers["limits"][key] is not None]
    return keys or ["max_length"]


def out_of(count: int, total: int) -> str:
    """A count in words that also give its share."""
    return f"{count:,} of {total:,} ({count / total:.0%})"
