"""The replies within a conversation that are learned beside its last one, with `loss: all`.

They can be where the chat template writes each of them, and all before it, within the conversation as it does where it
is the last turn. Then the conversation's text is that of its turns, one after the other, and a reply carries loss on
the tokens on which it would as the last one.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data.problems import where_they_differ
from rlhf_pipeline.data.turns import Record, as_reply
from rlhf_pipeline.models.tokenizer import TemplateError, TurnEnd, render, render_reply

Turns = list[dict[str, Any]]
HINT = "`loss: last` learns the last reply alone; `bad_rows: drop` leaves such rows out"


def without_marks(record: Record) -> tuple[Record, list[int]]:
    """A demonstration without the marks of `turns.with_marks`, and the places in its prompt of the replies to learn."""
    prompt = record[0]
    if isinstance(prompt, str):
        return record, []
    places = [i for i, turn in enumerate(prompt) if turn["role"] == "assistant" and turn.get("learned", True)]
    plain = [{key: value for key, value in turn.items() if key != "learned"} for turn in prompt]
    return (plain, *record[1:]), places


def in_pieces(tokenizer: PreTrainedTokenizerBase, turns: Turns, places: list[int], end: TurnEnd) -> list[list[str]]:
    """A prompt's text, taken apart at the replies in it that are to be learned.

    To render the conversation up to each reply would take time that is quadratic in the number of turns. So this is
    done for the first reply and for those whose number behind it is a power of two. Of each other one, the turns since
    the reply before it, and that reply, are rendered behind the conversation's first turns. Where that is another text
    than the whole conversation has there, as where a template counts the turns, all up to the reply are rendered.

    Args:
        tokenizer: from `load_tokenizer`.
        turns: the prompt, as for `render`.
        places: of the replies.
        end: from `turn_end`.

    Returns:
        For each reply the text before it, since the one before, and its own without EOS; and what is left, alone. The
        EOS of a reply begins the text behind it.

    Raises:
        TemplateError: a reply, or what is before it, is another text within the conversation than where it is the last
            turn, or the chat template ends it in another token than EOS.
    """
    text, eos = render(tokenizer, turns, checked=False), tokenizer.eos_token
    first = turns[: next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")]
    begun = render(tokenizer, first, checked=False)
    found: list[list[str]] = []
    at = 0  # behind the EOS of the reply before
    for number, place in enumerate(places):
        piece = None
        if number & (number - 1):
            few = [*first, *turns[places[number - 1] : place + 1]]
            piece = _in_short(tokenizer, few, begun + found[-1][1] + eos, end)
        if piece is None or not text.startswith("".join(piece) + eos, at):
            piece = _up_to(tokenizer, turns, place, end, text, at)
        found.append([eos + piece[0] if number else piece[0], piece[1]])
        at += len("".join(piece) + eos)
    return [*found, [eos + text[at:]]]


def _up_to(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, place: int, end: TurnEnd, text: str, at: int
) -> tuple[str, str]:
    """What is before a reply, from `at` on, and the reply, as they are where it is the last turn.

    Raises:
        TemplateError: the text of the whole conversation has something else there.
    """
    try:
        prompt = render(tokenizer, turns[:place], checked=False)
        said, _ = render_reply(tokenizer, turns[:place], prompt, as_reply(turns[place], "turns"), end)
    except TemplateError as error:
        raise TemplateError(f"with turn {place + 1} as the last one, {error}") from None
    eos = tokenizer.eos_token
    if text.startswith(prompt + said + eos) and len(prompt) >= at:
        return prompt[at:], said
    which = f"turn {place + 1} of the conversation, the assistant's,"
    if text.startswith(prompt + said) and len(prompt) >= at:
        other = text[len(prompt + said) :]
        own = (end.text or "").strip()
        shown = own if own and other.lstrip().startswith(own) else other[:20]
        raise TemplateError(
            f"{which} is followed by {shown!r} in the chat template, and a reply that is learned by EOS, {eos!r}"
        )
    alone, within = where_they_differ(prompt + said + eos, text)
    raise TemplateError(
        f"the chat template writes {which} in another way where more turns follow: {within!r}, and not {alone!r}"
    )


def _in_short(tokenizer: PreTrainedTokenizerBase, turns: Turns, begun: str, end: TurnEnd) -> tuple[str, str] | None:
    """What is before a reply, and the reply, as they are with little else in the conversation.

    Args:
        tokenizer: from `load_tokenizer`.
        turns: the first ones of the conversation, and those from the reply before up to this one.
        begun: their text up to the EOS of the reply before.
        end: from `turn_end`.

    Returns:
        None where the template writes their beginning in another way.
    """
    try:
        prompt = render(tokenizer, turns[:-1], checked=False)
        said, _ = render_reply(tokenizer, turns[:-1], prompt, as_reply(turns[-1], "turns"), end)
    except TemplateError:
        return None
    return (prompt.removeprefix(begun), said) if prompt.startswith(begun) else None
