"""One tokenizer for all stages: left padding, a pad token that is nothing else, and a chat template."""

import contextlib
import json
import re
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError as JinjaError
from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.base import check_files, load_config, refuse_untrusted_code
from rlhf_pipeline.recipe.schema import Model

# The chat template of a model that has none. Prompt and reply meet at a line break, so that a reply's first word is
# encoded as at the beginning of any line.
DEFAULT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
# What `strftime_now` gives in a chat template: with today's date, the same weights would have other scores tomorrow.
# It is the day that Llama 3's templates name where they are not told of another.
DAY = date(2024, 7, 26)
# A question and its answer, by which it is found out how a template writes a turn.
QUESTION, ANSWER = {"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}

ANOTHER = "`model.chat_template` can name one that does"
MARKER = 730219640  # of the numbers by which it is found out what a template leaves out


class TemplateError(Exception):
    """A chat template cannot render a conversation; the message says why, in the template's words."""


def load_tokenizer(model: Model | str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer and make it fit for every stage.

    PPO finds the end of a reply by its padding, so pad must differ from EOS: with pad == EOS, TRL masks EOS out and
    takes padding for the end of a reply. Where the tokenizer has no pad token of its own, a special token that text
    never contains takes its place. The embedding is never resized: it belongs to the base.

    The chat template is the recipe's `chat_template`, else the tokenizer's own, else a plain default; see
    `has_default_template`. What the recipe says in `chat_template_kwargs`, a fixed day for `strftime_now`, and the
    beginning of a reply where `add_generation_prompt` gives none are written into it, so that whoever renders it writes
    the same. It is saved with the tokenizer.

    Args:
        model: the recipe's `model`; a folder or hub id alone means one with all else as by default.

    Returns:
        The tokenizer, padding on the left, with `pad_token_id` different from `eos_token_id`.

    Raises:
        InputError: the model has no tokenizer, one whose code is not trusted, no EOS, nothing that can serve as
            padding, or an invalid chat template.
    """
    spec = Model(path=model) if isinstance(model, str) else model
    path = spec.path
    check_files(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=spec.revision, trust_remote_code=spec.trust_remote_code, padding_side="left"
        )
    except (OSError, ValueError, KeyError) as error:
        refuse_untrusted_code(spec, error)
        raise InputError(
            f"no tokenizer could be loaded: {str(error).splitlines()[0]}",
            place=f"model.path: {path}",
            hint="a model folder needs its tokenizer files; a hub id needs the network once",
        ) from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what Transformers makes of a folder without its files
        raise InputError(
            "no tokenizer could be loaded: it knows no tokens",
            place=f"model.path: {path}",
            hint="a model folder needs its tokenizer files",
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token, so replies could never end",
            place=f"model.path: {path}",
            hint="set `eos_token` in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _pad_token(tokenizer, spec)
    _set_chat_template(tokenizer, spec)
    return tokenizer


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, spec: Model) -> None:
    place = spec.place
    if spec.chat_template is not None:
        place = spec.chat_template
        try:
            tokenizer.chat_template = Path(spec.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(f"the chat template cannot be read: {reason}", place=place) from None
        if not tokenizer.chat_template.strip():
            raise InputError("the chat template is empty", place=place)
    elif not tokenizer.chat_template:
        # Other templates write the BOS themselves, since what they render is encoded without special tokens.
        bos = "{{- bos_token }}" if begins_with_bos(tokenizer, tokenizer("a")["input_ids"]) else ""
        tokenizer.chat_template = bos + DEFAULT_TEMPLATE
    try:
        with contextlib.suppress(TemplateError):  # it may refuse this conversation and render those of the data
            render(tokenizer, [{"role": "user", "content": "a"}])
    except TemplateSyntaxError as error:
        raise InputError(
            f"the chat template is not valid Jinja: {error.message}", place=f"{place}:{error.lineno}"
        ) from None
    own = tokenizer.chat_template  # text, or several by name
    texts = own if isinstance(own, dict) else {"": own}
    for name in spec.chat_template_kwargs:
        if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts.values()):
            raise InputError(
                f"the chat template does not use `{name}`, so it would be ignored",
                place=f"model.chat_template_kwargs.{name}",
                hint="remove it, or check its spelling in the template",
            )
    texts = {name: fixed(text, spec.chat_template_kwargs) for name, text in texts.items()}
    tokenizer.chat_template = texts if isinstance(own, dict) else _with_header(tokenizer, texts[""])


def fixed(template: str, settings: dict[str, Any]) -> str:
    """A chat template that begins with the recipe's settings, and in which today is `DAY`."""
    before = "".join(
        f"{{% set {name} = {name} if {name} is defined else {_literal(value)} %}}" for name, value in settings.items()
    )
    if "strftime_now" in template and pinned_day(template) is None:
        directives = "".join(
            f" | replace({json.dumps('%' + one)}, {json.dumps(DAY.strftime('%' + one), ensure_ascii=False)})"
            for one in ("-d", "-m", *"aAbBcdDeFGhHIjmMpSTuUVwWxXyY")
        )
        before += f"{{# today is {DAY.isoformat()} #}}"
        before += f"{{% macro strftime_now(format) %}}{{{{ format{directives} }}}}{{% endmacro %}}"
    if template.startswith(before):
        return template
    return before + ("{{ '' }}" if template.startswith("\n") else "") + template  # a block takes a line break after it


def _literal(value: Any) -> str:
    """A value as Jinja writes it; `json.dumps` but for null."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(one)}' for key, one in value.items())}}}"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def pinned_day(template: str | dict[str, str] | None) -> str | None:
    """The day that `load_tokenizer` has put in the place of today, in ISO 8601; None where a template asks for none."""
    found = re.search(r"\{# today is (\S+) #\}", str(template))
    return found[1] if found else None


def _with_header(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """A template that writes the beginning of the assistant's turn where `add_generation_prompt` asks for it.

    Some know nothing of it, so that a model would have to write `<|assistant|>` itself. Spaces at its end belong to the
    reply, as a word has the space before it.
    """
    tokenizer.chat_template = template
    try:
        asked, begun = (_apply(tokenizer, [QUESTION], add_generation_prompt=add) for add in (False, True))
        before, found, _ = _apply(tokenizer, [QUESTION, ANSWER]).rpartition(ANSWER["content"])
    except TemplateError:
        return template
    header = before.removeprefix(asked).rstrip(" ")
    if begun != asked or not found or not before.startswith(asked) or not header:
        return template
    # Jinja leaves out the last line break of a template.
    return template.removesuffix("\n") + f"{{% if add_generation_prompt %}}{{{{ {_literal(header)} }}}}{{% endif %}}"


def has_default_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer from `load_tokenizer` has the plain default for want of a chat template of its own."""
    return isinstance(tokenizer.chat_template, str) and tokenizer.chat_template.endswith(DEFAULT_TEMPLATE)


def begins_with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int], times: int = 1) -> bool:
    """Whether token ids begin with BOS, so many times."""
    return tokenizer.bos_token_id is not None and ids[:times] == [tokenizer.bos_token_id] * times


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], checked: bool = True) -> str:
    """A conversation as text, up to where the assistant's reply begins.

    The text has all the special tokens it shall have: encode it with `add_special_tokens=False`.

    Args:
        tokenizer: from `load_tokenizer`.
        turns: `{role, content}`, an assistant's perhaps with `tool_calls` and `reasoning_content`; the first one
            perhaps with the `tools` of the conversation.
        checked: whether it is seen to that the chat template leaves out no turn, which takes as long again.

    Raises:
        TemplateError: the chat template refuses the conversation, fails on it, or leaves out a part of it.
    """
    return _apply(tokenizer, turns, checked, add_generation_prompt=True)


def render_whole(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]]) -> str:
    """A whole conversation as text; see `render`."""
    return _apply(tokenizer, turns)


class TurnEnd(NamedTuple):
    """What ends an assistant's turn.

    Attributes:
        text: what the chat template writes behind the last turn, or None where that is not known.
        tokens: the tokens of which a reply that is given may have some at its end: EOS, and what is in `text`.
    """

    text: str | None
    tokens: tuple[str, ...]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """Find out what ends an assistant's turn."""
    eos = tokenizer.eos_token
    try:
        _, found, after = _apply(tokenizer, [QUESTION, ANSWER]).rpartition(ANSWER["content"])
    except TemplateError:
        return TurnEnd(None, (eos,))
    if not found:
        return TurnEnd(None, (eos,))
    own = after.strip()
    return TurnEnd(after, (eos, own) if own != eos and own in tokenizer.get_added_vocab() else (eos,))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a chat template writes behind an assistant's turn, or None where that is not known."""
    text = turn_end(tokenizer).text
    return None if text is None else text.strip()


def begins_with_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes a space between a prompt and a reply, as in `ASSISTANT: Yes`."""
    try:
        whole = _apply(tokenizer, [QUESTION, ANSWER])
        return whole.startswith(render(tokenizer, [QUESTION]) + " " + ANSWER["content"])
    except TemplateError:
        return False


def render_reply(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, Any]],
    prompt: str,
    reply: str | dict[str, Any],
    end: TurnEnd,
) -> tuple[str, str | None]:
    """A reply as the chat template writes it after its prompt, without the EOS that ends it.

    Args:
        tokenizer: from `load_tokenizer`.
        turns: the prompt, as for `render`.
        prompt: what `render` made of it.
        reply: its text, or an assistant's turn.
        end: from `turn_end`.

    Returns:
        The text that follows the prompt; and None, or the template's own text of the whole conversation where that is
        another one than prompt and reply: the reply then is as it was given.

    Raises:
        TemplateError: the chat template refuses the conversation, fails on it, or leaves out a part of the reply.
    """
    turn = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
    content = without_end(turn["content"], *end.tokens)
    whole = _apply(tokenizer, [*turns, turn | {"content": content}])
    # A prompt may open what belongs to the reply, as `<think>`.
    opening = re.search(r"(<[^<>\s]+>|\[[A-Z_]+\])\s*$", prompt)
    if whole.startswith(prompt):
        said = whole[len(prompt) :]
        if opening and said.lstrip().startswith(opening[1]):  # and the template opens it again
            said = said.lstrip().removeprefix(opening[1]).lstrip()
        there = _squeezed((opening[0] if opening else "") + said)
        if all(_squeezed(part) in there for part in (content, turn.get("reasoning_content", ""))):
            return _without_turns_end(said, content, end), None
    if not isinstance(reply, str):
        part = "reasoning_content" if "reasoning_content" in reply else "tool_calls"
        raise TemplateError(f"the chat template does not write the reply's `{part}` after its prompt")
    if opening and content.lstrip().startswith(opening[1]):
        said = content.lstrip()
        said = said.removeprefix(opening[0]) if said.startswith(opening[0]) else said.removeprefix(opening[1]).lstrip()
        return said, None
    return content, whole


def without_end(text: str, *ends: str) -> str:
    """A reply without the tokens that end it, and the white space behind them."""
    while found := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(found)
    return text


def _without_turns_end(said: str, content: str, end: TurnEnd) -> str:
    """What a template writes of a reply, up to the EOS or, where that is none, up to the end of the turn."""
    eos = end.tokens[0]
    if end.text is not None and said.endswith(end.text):
        before, found, _ = end.text.partition(eos)
        said = said.removesuffix(end.text) + (before if found and not before.strip() else "")
    elif eos in said:
        said = said[: said.rindex(eos)]
    elif content.strip() in said:
        said = said[: said.rindex(content.strip()) + len(content.strip())]
    return without_end(said, eos)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _apply(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], checked: bool = True, **options: Any
) -> str:
    """A conversation as a template writes it, with all its parts.

    Templates differ in how they take the arguments of a call: as a mapping or as JSON. The first way counts in which
    the calls are written.
    """
    tools = turns[0].get("tools")
    plain = [{key: value for key, value in turn.items() if key != "tools"} for turn in turns]
    for turn in plain:
        if "reasoning_content" in turn:
            turn["thinking"] = turn["reasoning"] = turn["reasoning_content"]  # as some templates call it
    if any("tool_calls" in turn for turn in plain):
        text, plain = _with_calls(tokenizer, plain, tools, options)
    else:
        text = _rendered(tokenizer, plain, tools, options)
    if tools and text == _or_none(tokenizer, plain, None, options):
        raise TemplateError(f"the chat template does not write `tools`; {ANOTHER}")
    if checked and (options or any("tool_calls" in turn for turn in plain)):
        _require_all_written(tokenizer, plain, tools, options)
    return text


def _require_all_written(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], tools: Any, options: dict[str, Any]
) -> None:
    """See that a template writes something of each turn's content and of each call's arguments.

    Each is replaced by a number of its own, which has to be there: what a turn says may be elsewhere in the text by
    chance, and templates change it, as where they leave out what was thought before. The last turn's content is not
    looked at where it is the assistant's: see `render_reply`.

    Raises:
        TemplateError: something is missing, and what.
    """
    wanted: dict[str, str] = {}

    def numbered(what: str) -> str:
        number = str(MARKER + len(wanted))
        wanted[number] = what
        return number

    tried = []
    for place, turn in enumerate(turns, 1):
        role = turn["role"]
        if turn["content"].strip() and not (place == len(turns) and role == "assistant"):
            what = {"tool": "the turns of tools", "system": "the system turn"}.get(role, f"turn {place}, of {role}")
            beside = ", beside `tool_calls`" if "tool_calls" in turn else ""
            turn = turn | {"content": numbered(f"{what}{beside}")}
        calls = []
        for call in turn.get("tool_calls", ()):
            function = call["function"]
            given = function["arguments"]
            if given and given != "{}" and isinstance(given, dict | str):
                made: Any = {"argument": numbered(f"the arguments of `{function['name']}` in `tool_calls`")}
                function = function | {"arguments": json.dumps(made) if isinstance(given, str) else made}
            calls.append(call | {"function": function})
        tried.append(turn | {"tool_calls": calls} if calls else turn)
    text = _or_none(tokenizer, tried, tools, options)
    if text is None:  # it may take certain contents alone
        return
    for number, what in wanted.items():
        if number not in text:
            raise TemplateError(f"the chat template does not write {what}; {ANOTHER}")


def _with_calls(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], tools: Any, options: dict[str, Any]
) -> tuple[str, list[dict[str, Any]]]:
    """The text of a conversation with calls, and its turns with arguments as the template takes them."""
    without = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in turns]
    bare = _or_none(tokenizer, without, tools, options)
    refusal = TemplateError(f"the chat template does not write `tool_calls`; {ANOTHER}")
    for as_json in (False, True):
        tried = [_as_called(turn) if as_json and "tool_calls" in turn else turn for turn in turns]
        try:
            text = _rendered(tokenizer, tried, tools, options)
        except TemplateError as error:
            refusal = refusal if as_json else error
            continue
        names = [call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ())]
        if text != bare and all(name in text for name in names):
            return text, tried
    raise refusal


def _as_called(turn: dict[str, Any]) -> dict[str, Any]:
    """An assistant's turn whose calls have their arguments as JSON."""
    functions = [call["function"] for call in turn["tool_calls"]]
    as_json = [one | {"arguments": json.dumps(one["arguments"], ensure_ascii=False)} for one in functions]
    calls = [call | {"function": one} for call, one in zip(turn["tool_calls"], as_json, strict=True)]
    return turn | {"tool_calls": calls}


def _or_none(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], tools: Any, options: dict[str, Any]
) -> str | None:
    try:
        return _rendered(tokenizer, turns, tools, options)
    except TemplateError:
        return None


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], tools: Any, options: dict[str, Any]
) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options)
    except TemplateSyntaxError:  # found when the tokenizer is loaded
        raise
    except (JinjaError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TemplateError(f"the chat template cannot render this conversation: {words}") from None


def _pad_token(tokenizer: PreTrainedTokenizerBase, spec: Model) -> str:
    """A token for padding that exists, that is neither EOS nor BOS, and that text does not contain."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if str(token) not in taken]
    for wanted in ("pad", "unk", "reserved"):
        for token in special:
            if wanted in token.lower():
                return token
    # Many models have more embedding rows than tokens; such a row serves without resizing anything.
    if load_config(spec).get_text_config().vocab_size > len(tokenizer):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        return "<|pad|>"
    raise InputError(
        "the tokenizer has no pad token, and none that could serve as one",
        place=spec.place,
        hint="add one with `tokenizer.add_special_tokens`, resize the model's embedding, and save both to a folder",
    )
