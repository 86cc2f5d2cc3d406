"""The shapes that rows come in, recognised from their columns, and what is read of one row. No libraries.

Every shape becomes the same records: a prompt and a reply (demonstrations), a prompt, a chosen and a rejected reply
(preferences), a prompt, a reply and whether that is good (feedback), a prompt (prompts), or a prompt and a list of
replies (candidates). Where the columns fit several shapes, the first one counts in the order in which
`_demonstrations`, `_preferences`, `_feedback`, `_prompts` and `_candidates` try them. Where it is not sure what a
column means that would change what is learned, the rows are refused, with what `columns` may say about it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rlhf_pipeline.data import asked as prompts
from rlhf_pipeline.data import beside
from rlhf_pipeline.data.advice import Wanted, advice, needs
from rlhf_pipeline.data.asked import Asked
from rlhf_pipeline.data.columns import (
    CHOSEN,
    OF_THE_PROMPT,
    RANKED,
    RANKED_IN_NO_ORDER,
    REPLY,
    SYSTEM,
    TURNS,
    UNUSED,
    WHOLE,
    Seen,
    UnclearError,
    is_empty,
    listed,
    renames,
)
from rlhf_pipeline.data.doubts import (
    require_no_mark,
    require_no_prompt_within,
    require_replies_themselves,
    require_scores_agree,
)
from rlhf_pipeline.data.marks import (
    SCORE,
    THUMB,
    Mark,
    Scored,
    best,
    best_against_worst,
    best_and_worst,
    candidates,
    mark,
    number,
    pairs_of,
    ranking,
    thumb,
)
from rlhf_pipeline.data.pairs import require_common_beginnings, split_texts, whole_conversations, whole_transcripts
from rlhf_pipeline.data.parts import has_functions
from rlhf_pipeline.data.turns import (
    WITH_TURNS,
    Prompt,
    Record,
    Reply,
    Row,
    RowError,
    before_reply,
    demonstration,
    framed,
    is_transcript,
    reply_of,
    text_of,
    to_be_answered,
    turns_of,
    what_is_wrong,
    with_system,
)
from rlhf_pipeline.data.words import is_number
from rlhf_pipeline.errors import ColumnsError


@dataclass(frozen=True)
class Shape:
    """How rows are read.

    Attributes:
        name: what it is called, as "prompt/completion", "messages" or "ranking".
        says: the name and what is taken for what, in one line.
        read: the records of one row, perhaps none. Raises RowError where the row lacks something.
        of_replies: None, or what becomes of all replies to one prompt; `read` then gives (prompt, reply, score), and
            the result is the records without their prompt.
        labelled: each row says of one reply whether it is good.
        used_as: what each column is taken for, in the order of the columns; None for one that is not used.
    """

    name: str
    says: str
    read: Callable[[Row], list[Record]]
    of_replies: Callable[[Scored], list[Record]] | None = None
    labelled: bool = False
    used_as: dict[str, str | None] = field(default_factory=dict)

    def says_with(self, loss: str) -> str:
        """What it says where the recipe's `data.loss` is that."""
        if loss == "last" or not any(use in WITH_TURNS for use in self.used_as.values()):
            return self.says
        return f"{self.says}; the assistant's turns before it are learned, too"


def recognise(
    rows: Iterable[Row],
    wanted: Wanted,
    chat: bool | None = None,
    place: str | None = None,
    columns: Mapping[str, str] | None = None,
    pairs: str | None = None,
) -> Shape:
    """Tell a shape from the first rows.

    Args:
        rows: some rows; what is null in all of them does not count as a column.
        wanted: what a stage needs.
        chat: the recipe's `data.chat`.
        place: what to name in an error.
        columns: what the recipe has renamed already: yours by expected.
        pairs: the recipe's `data.pairs`.

    Raises:
        ColumnsError: these columns are none of the shapes, or it is not clear which.
    """
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    seen, system = _look_at(rows)
    try:
        only_best = wanted == "preferences" and pairs == "best_and_worst"
        shape = _preferences(seen, chat, best_against_worst) if only_best else _FIND[wanted](seen, chat)
        if shape is not None:
            return _complete(shape, seen, wanted, names, system)
    except UnclearError as problem:
        ways = [f"{renames(columns or {}, found)} {does}" for found, does in problem.ways]
        raise ColumnsError(str(problem), place=place, hint="; ".join(ways) or problem.hint, ways=problem.ways) from None
    raise ColumnsError(
        f"the columns ({', '.join(names) or 'none'}) are not {wanted}; those need {needs(wanted)}",
        place=place,
        hint=advice(wanted, names, seen, columns or {}, _fitting(seen, chat)),
    )


def _look_at(rows: list[Row]) -> tuple[Seen, str | None]:
    """The first rows, the system prompt under `system`, and the name that it has in them."""
    seen = Seen(rows)
    system = next((name for name in SYSTEM if seen.is_filled(name)), None) or seen.first_of(SYSTEM)
    if system not in (None, "system"):
        seen = Seen([row | {"system": row.get(system)} for row in rows])
    return seen, system


def _complete(shape: Shape, seen: Seen, wanted: Wanted, names: list[str], system: str | None) -> Shape:
    """A shape with what became of every column, which reads rows as they are in the data.

    Raises:
        UnclearError: a part of the prompt would be left out.
    """
    uses = {name: use for name, use in shape.used_as.items() if use is not None}
    if system and shape.name != "text":
        uses["system"] = "system prompt"
    if seen.is_filled("tools") and shape.name != "text":
        uses["tools"] = "tools"
    if seen.share("functions", has_functions) and not seen.is_filled("tools") and shape.name != "text":
        uses["functions"] = "tools"
    uses |= prompts.require_all_used(seen, uses)
    if system not in (None, "system") and "system" in uses:
        uses[system] = uses.pop("system")
    weighed = [] if wanted == "prompts" or shape.name == "text" else beside.weights(seen, uses)
    uses |= dict.fromkeys(weighed, "whether the row is trained")
    if wanted != "prompts" and not {"label", "score", "order of the replies"} & set(uses.values()):
        replies = [name for name, use in uses.items() if use == "reply"]
        if replies or shape.name in (*WHOLE, "text"):
            # Numbers beside texts are of crawls, as how sure their language is.
            numbers = [name for name in seen.values if shape.name == "text" and seen.mostly(name, is_number)]
            require_no_mark(seen, {*uses, *numbers}, next(iter(replies), None))
    marks = () if wanted in ("prompts", "candidates") or "rejected" in seen else (*THUMB, *SCORE)
    reply = next((name for name, use in uses.items() if use == "reply"), None)
    if reply and wanted == "demonstrations":
        beside.require_no_reasoning(seen, uses, reply)
    late = [name for name in (*OF_THE_PROMPT, *marks) if name not in ("system", *uses) and not seen.is_filled(name)]

    def read(row: Row) -> list[Record]:
        for name in late:
            if not is_empty(row.get(name)):
                raise RowError(
                    f"`{name}` is filled in here and in none of the first {len(seen.rows)} rows, which tell how all "
                    "are read: put a row that has it first"
                )
        as_read = {name: listed(name, value) if name in uses else value for name, value in row.items()}
        if system not in (None, "system"):
            as_read["system"] = as_read.get(system)
        found = shape.read(as_read)
        return found if beside.is_trained(row, weighed) else []

    used_as = {name: uses.get(name) for name in names} | beside.unused_in_turns(seen, uses)
    return replace(shape, read=read, used_as=used_as)


def _fitting(seen: Seen, chat: bool | None) -> list[Wanted]:
    """What the rows are."""
    found: list[Wanted] = []
    for wanted, find in _FIND.items():
        try:
            if find(seen, chat):
                found.append(wanted)
        except UnclearError:
            pass
    return found


# Which shape


def _demonstrations(seen: Seen, chat: bool | None) -> Shape | None:
    asked, reply = prompts.find(seen, chat), _reply(seen)
    if "prompt" in seen and "completion" not in seen and seen.first_of(WHOLE):
        asked = None  # beside a whole conversation, `prompt` repeats its beginning
    if asked and reply:
        require_replies_themselves(seen, [reply.column])
        _require_reply_alone(seen, asked, reply.column)
        return _single(asked, reply, _mark(seen, reply.column, "demonstrations"), "demonstrations") or Shape(
            f"{asked.name}/{reply.column}",
            f"{asked.name}/{reply.column}: {asked.says} and {reply.says}",
            lambda row: [(to_be_answered(asked.read(row)), reply.read(row))],
            used_as={**asked.uses, reply.column: "reply"},
        )
    column = seen.first_of(WHOLE)
    if column and "chosen" not in seen:
        marked = _mark(seen, None, "demonstrations")
        if marked:
            return _marked_conversations(column, marked, "demonstrations")
        says = f"{column}: conversations, whose last turn is the reply"
        return Shape(column, says, lambda row: demonstration(row, column), used_as={column: "conversation"})
    preferences = _preferences(seen, chat)
    if preferences is not None:  # rankings and chosen/rejected; labels and scores were looked for above
        if seen.first_of(CHOSEN):
            says = f"{preferences.says}; the chosen one is the reply"
            return replace(preferences, says=says, read=lambda row: [record[:2] for record in preferences.read(row)])
        return _ranking(seen, chat, best)
    if "text" in seen:
        return _text_alone(seen)
    return None


def _text_alone(seen: Seen) -> Shape:
    """Text that is learned as it is.

    Raises:
        UnclearError: it is not text alone.
    """
    if seen.mostly("text", lambda value: isinstance(value, list) or TURNS.match(str(value)) is not None):
        raise UnclearError("`text` holds turns", ({"messages": "text"}, "takes them for conversations"))
    if "role" in seen:
        raise UnclearError(
            "each row is one turn, by its `role`: a row should hold a prompt and its reply",
            ({UNUSED: "role"}, "learns every `text` on its own"),
        )
    marked = _mark(seen, None, "demonstrations")
    if marked and marked.says == "label":
        raise UnclearError(
            f"`{marked.column}` may say that some of the texts are bad, and all of them would be learned",
            ({UNUSED: marked.column}, "learns them all"),
        )
    return Shape(
        "text",
        "text: all of it is learned, there is no prompt",
        lambda row: [("", reply_of(row, "text"))],
        used_as={"text": "text"},
    )


def _preferences(seen: Seen, chat: bool | None, choose: Callable[[Scored], list[Record]] = pairs_of) -> Shape | None:
    found = _pair(seen, chat)
    if found is not None:
        return found
    found = _ranking(seen, chat, choose) or _marked(seen, chat, "preferences")
    if found is None or choose is pairs_of:
        return found
    if found.of_replies is not None:
        return replace(found, says=f"{found.says.rpartition('; ')[0]}; the best with the worst", of_replies=choose)
    return replace(found, says=f"{found.says}; the best with the worst")


def _feedback(seen: Seen, chat: bool | None) -> Shape | None:
    pairs = _pair(seen, chat)
    if pairs is None:
        return _ranking(seen, chat, best_and_worst) or _marked(seen, chat, "feedback")

    def read(row: Row) -> list[Record]:
        found = pairs.read(row)
        return [(prompt, *reply) for prompt, *both in found for reply in zip(both, (True, False), strict=True)]

    return replace(pairs, says=f"{pairs.says}; the chosen one is good, the rejected one bad", read=read)


def _pair(seen: Seen, chat: bool | None) -> Shape | None:
    """A better and a worse reply in each row."""
    asked, better = prompts.find(seen, chat), seen.first_of(CHOSEN)
    if better and "rejected" in seen:
        return _chosen_and_rejected(seen, chat, asked, better)
    column = seen.first_of(WHOLE)
    if "rejected_response" in seen:  # as ms-swift has it
        if column:
            return _beside_rejected(column)
        if asked and "response" in seen:
            return _replies_to(asked, "response", "rejected_response")
    return None


def _marked(seen: Seen, chat: bool | None, wanted: Wanted) -> Shape | None:
    """A reply in each row, and how good it is."""
    asked, reply, column = prompts.find(seen, chat), _reply(seen), seen.first_of(WHOLE)
    if asked and reply:
        _require_reply_alone(seen, asked, reply.column)
        return _single(asked, reply, _mark(seen, reply.column, wanted), wanted)
    marked = _mark(seen, None, wanted) if column else None
    return _marked_conversations(column, marked, wanted) if column and marked else None


def _mark(seen: Seen, reply: str | None, wanted: Wanted) -> Mark | None:
    return mark(seen, reply, pairs=wanted == "preferences", needed=wanted != "demonstrations")


def _prompts(seen: Seen, chat: bool | None) -> Shape | None:
    asked = prompts.find(seen, chat)
    if asked:
        says = f"{asked.name}: {asked.says}"
        return Shape(asked.name, says, lambda row: [(to_be_answered(asked.read(row)),)], used_as=dict(asked.uses))
    column = seen.first_of(WHOLE)
    if column:
        says = f"{column}: conversations, without the reply that may come last"
        return Shape(column, says, lambda row: [(before_reply(row, column),)], used_as={column: "conversation"})
    better = seen.first_of(CHOSEN)
    if better and "rejected" in seen:
        pairs = _chosen_and_rejected(seen, chat, None, better)
        says = f"{pairs.says}; only the prompt is taken"
        return replace(pairs, says=says, read=lambda row: [pairs.read(row)[0][:1]])
    return None


def _candidates(seen: Seen, chat: bool | None) -> Shape | None:
    """Several replies to each prompt, in no order: a list of them, or a chosen and a rejected one."""
    asked = prompts.find(seen, chat)
    found = candidates(seen) if asked else None
    if asked is not None and found is not None:
        column, read_replies = found

        def read(row: Row) -> list[Record]:
            replies = read_replies(row)
            return [(to_be_answered(asked.read(row)), replies)] if len(replies) > 1 else []

        return Shape(
            "replies",
            f"replies: {asked.says} under `{asked.name}`, `{column}` in no order",
            read,
            used_as={**asked.uses, column: "replies"},
        )
    pairs = _pair(seen, chat)
    if pairs is None:
        return None
    return replace(
        pairs,
        says=f"{pairs.says}; which one was chosen is not read",
        read=lambda row: [(prompt, replies) for prompt, *replies in pairs.read(row)],
    )


_FIND: dict[Wanted, Callable[[Seen, bool | None], Shape | None]] = {
    "demonstrations": _demonstrations, "preferences": _preferences, "prompts": _prompts, "feedback": _feedback,
    "candidates": _candidates,
}  # fmt: skip
WANTED = tuple(_FIND)


# One reply to a prompt


class _Reply(NamedTuple):
    """Where a row's reply is."""

    column: str
    says: str
    read: Callable[[Row], Reply]


def _reply(seen: Seen) -> _Reply | None:
    """Text or a turn, or the first text of `answers`, as SQuAD has them, {text: [...], answer_start: [...]}."""
    column = seen.first_of(REPLY)
    if column:
        return _Reply(column, "the reply", lambda row: reply_of(row, column))
    if seen.mostly("answers", lambda value: isinstance(value, dict) and "text" in value):
        return _Reply("answers", "the first text of `answers` as the reply", _first_answer)
    return None


def _require_reply_alone(seen: Seen, asked: Asked, reply: str) -> None:
    """See that a reply does not begin with its prompt, where that is text: what somebody says may be repeated.

    Raises:
        UnclearError: it does.
    """
    if "prompt" in asked.uses and asked.says.startswith("text"):
        ways = [({"question": "prompt"}, "takes the prompt for a user's turn, which the reply repeats")]
        require_no_prompt_within(seen, "prompt", [reply], ways)


def _first_answer(row: Row) -> str:
    value = row.get("answers")
    texts = value.get("text") if isinstance(value, dict) else value
    if not isinstance(texts, list) or not texts:
        raise RowError(what_is_wrong("answers", texts, "{text: list of texts}"))
    return text_of({"answers": texts[0]}, "answers")


def _single(asked: Asked, reply: _Reply, marked: Mark | None, wanted: Wanted) -> Shape | None:
    """A prompt and one reply in each row, and how good that is; None where nothing says it."""
    if marked is None:
        return None
    return _of_marked(
        f"{asked.name}/{reply.column}/{marked.column}",
        f"{asked.says} and",
        lambda row: [(to_be_answered(asked.read(row)), reply.read(row))],
        marked,
        wanted,
        {**asked.uses, reply.column: "reply"},
    )


def _marked_conversations(column: str, marked: Mark, wanted: Wanted) -> Shape:
    """A whole conversation in each row, and how good the reply is that ends it."""
    name = f"{column}/{marked.column}"
    says, uses = "conversations, whose last turn is", {column: "conversation"}
    judged = wanted == "demonstrations"
    return _of_marked(name, says, lambda row: demonstration(row, column, judged=judged), marked, wanted, uses)


def _of_marked(
    name: str, says: str, read: Callable[[Row], list[Record]], marked: Mark, wanted: Wanted, uses: dict[str, str]
) -> Shape:
    """Replies of which each row says how good they are; the rows of a prompt belong together."""
    column = marked.column
    used: dict[str, str | None] = {**uses, column: marked.says}
    if marked.says == "score":
        taken, choose = {
            "preferences": ("every better with every worse reply to a prompt", pairs_of),
            "feedback": ("the best reply to a prompt is good, the worst bad", best_and_worst),
        }.get(wanted, ("the best reply to each prompt", best))
        says = f"{name}: {says} a scored reply in each row; {taken}"
        return Shape(
            name,
            says,
            lambda row: [(*record, number(row.get(column), column)) for record in read(row)],
            choose,
            used_as=used,
        )
    if wanted == "feedback":
        return Shape(
            name,
            f"{name}: {says} a good or bad reply in each row",
            lambda row: [(*record, thumb(row, column)) for record in read(row)],
            labelled=True,
            used_as=used,
        )
    if wanted == "preferences":
        return Shape(
            name,
            f"{name}: {says} a good or bad reply in each row; every good with every bad reply to a prompt",
            lambda row: [(*record, float(thumb(row, column))) for record in read(row)],
            pairs_of,
            labelled=True,
            used_as=used,
        )

    def read_good(row: Row) -> list[Record]:
        records = read(row)
        return records if thumb(row, column) else []

    says = f"{name}: {says} a good or bad reply in each row; the good ones are taken"
    return Shape(name, says, read_good, labelled=True, used_as=used)


# Several replies to a prompt


def _ranking(seen: Seen, chat: bool | None, choose: Callable[[Scored], list[Record]]) -> Shape | None:
    """All replies to a prompt in one row: best first, or with what gives their order."""
    asked = prompts.find(seen, chat)
    ranked = ranking(seen) if asked else None
    if asked is None or ranked is None:
        return None

    def read(row: Row) -> list[Record]:
        prompt = to_be_answered(asked.read(row))
        return [(prompt, *record) for record in choose(ranked.read(row))]

    name = "scores per reply" if ranked.scored else "ranking"
    says = f"{name}: {asked.says} under `{asked.name}`, `{ranked.column}` {ranked.says}"
    return Shape(name, says, read, used_as={**asked.uses, **ranked.uses})


# Pairs of replies


def _chosen_and_rejected(seen: Seen, chat: bool | None, asked: Asked | None, better: str) -> Shape:
    """Chosen and rejected: replies to a prompt, or whole conversations or texts that begin alike."""
    require_replies_themselves(seen, (better, "rejected"), (*RANKED, *RANKED_IN_NO_ORDER))
    require_scores_agree(seen)
    whole = seen.mostly(better, lambda value: isinstance(value, list) and len(value) > 1)
    before = seen.first_of(WHOLE)
    if asked is None and before and not whole:

        def read_before(row: Row) -> Prompt:
            return to_be_answered(with_system(turns_of(row, before), row))

        asked = Asked(before, "a conversation", read_before, {before: "conversation before the replies"})

    if asked is not None and not whole:
        prompt = next(iter(asked.uses))
        ways = [({UNUSED: prompt}, f"takes the common beginning of `{better}` and `rejected` for it")]
        require_no_prompt_within(seen, prompt, [better, "rejected"], ways)
        return _replies_to(asked, better, "rejected")

    def read(row: Row) -> list[Record]:
        chosen, rejected = row.get(better), row.get("rejected")
        if isinstance(chosen, list) and len(chosen) > 1:
            return [whole_conversations(row, better)]
        if asked is not None:
            return [(to_be_answered(asked.read(row)), reply_of(row, better), reply_of(row, "rejected"))]
        if isinstance(chosen, list):
            raise RowError(f"`{better}` holds a reply alone, and there is no `prompt`")
        chosen, rejected = text_of(row, better), text_of(row, "rejected")
        if chat is not False and is_transcript(chosen):
            return [whole_transcripts(chosen, rejected, row, better)]
        prompt, *replies = split_texts(chosen, rejected, better)
        return [(framed(prompt, row, bool(chat) or "system" in seen), *replies)]

    name, what = f"{better}/rejected", "text"
    if seen.mostly(better, lambda value: isinstance(value, list)):
        what, says = "conversation", "conversations that differ in their last turn"
    elif chat is not False and seen.mostly(better, is_transcript):
        says = "texts of Human and Assistant, which become turns"
    else:
        require_common_beginnings(seen, better)
        says = "texts, whose common beginning is the prompt"
    uses = {better: f"chosen {what}", "rejected": f"rejected {what}"}
    return Shape(name, f"{name}: {says}", read, used_as=dict(uses))


def _replies_to(asked: Asked, better: str, worse: str) -> Shape:
    """A prompt and two replies."""

    def read(row: Row) -> list[Record]:
        if isinstance(row.get(better), list) and len(row[better]) > 1:
            return [whole_conversations(row, better)]
        return [(to_be_answered(asked.read(row)), reply_of(row, better), reply_of(row, worse))]

    name = f"{asked.name}/{better}/{worse}"
    uses = {**asked.uses, better: "chosen reply", worse: "rejected reply"}
    return Shape(name, f"{name}: {asked.says} and two replies", read, used_as=dict(uses))


def _beside_rejected(column: str) -> Shape:
    """A whole conversation, and a reply that is worse than its last turn."""
    name = f"{column}/rejected_response"
    return Shape(
        name,
        f"{name}: conversations, whose last turn is the chosen reply, and the rejected one",
        lambda row: [(*found, reply_of(row, "rejected_response")) for found in demonstration(row, column)],
        used_as={column: "conversation", "rejected_response": "rejected reply"},
    )
