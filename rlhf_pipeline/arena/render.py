"""Prompts and replies as HTML that is safe to put into a page, whatever a model has written."""

import contextlib
import html
import json
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from rlhf_pipeline.rundir.items import Prompt, Reply
from rlhf_pipeline.rundir.words import printable

LONGEST_MARKDOWN = 100_000  # characters: longer text is shown as it is
LONGEST_CODE = 20_000  # characters: longer code is not coloured

Direction = Literal["ltr", "rtl", "auto"]


class _Renderer(RendererHTML):
    """HTML that loads nothing: a picture is the text that stands for it, and a link opens elsewhere."""

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """A picture as its text and address."""
        token = tokens[idx]
        stands_for = self.renderInlineAsText(token.children or [], options, env) or "picture"
        shown = f"[{stands_for}: {token.attrGet('src')}]"
        return f'<span class="picture">{escapeHtml(shown)}</span>'

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """The beginning of a link, which says nothing of this page."""
        tokens[idx].attrSet("rel", "noopener noreferrer nofollow")
        tokens[idx].attrSet("target", "_blank")
        return self.renderToken(tokens, idx, options, env)


def _colour(code: str, language: str, _: str) -> str:
    """A block of code with the classes of Pygments; from left to right in every text."""
    shown = escapeHtml(code)
    if language and len(code) <= LONGEST_CODE:
        with contextlib.suppress(ClassNotFound):
            shown = highlight(code, get_lexer_by_name(language, stripnl=False), HtmlFormatter(nowrap=True))
    return f'<pre class="code" dir="ltr" tabindex="0"><code>{shown}</code></pre>\n'


# Markup is escaped. Indented text is no code: models write code in fences, and prompts are indented for other reasons.
_MARKDOWN = MarkdownIt(
    "commonmark", {"html": False, "breaks": True, "highlight": _colour}, renderer_cls=_Renderer
).enable(["table", "strikethrough"]).disable("code")  # fmt: skip


@lru_cache(maxsize=4096)
def text(source: str) -> str:
    """Text as HTML, its Markdown drawn. Characters that steer a page are shown as symbols."""
    source = printable(source)
    if len(source) > LONGEST_MARKDOWN:
        return f'<pre class="plain">{html.escape(source)}</pre>'
    return _MARKDOWN.render(source)


def reply(value: Reply) -> str:
    """A reply as HTML; of a turn also its reasoning and its calls of tools."""
    return text(value) if isinstance(value, str) else _turn(value)


def turns(prompt: Prompt) -> list[dict[str, str]]:
    """The turns of a prompt, each with `role` and `html`; none of a prompt that is plain text."""
    if isinstance(prompt, str):
        return []
    return [{"role": str(turn.get("role")), "html": _turn(turn)} for turn in prompt]


def prompt_html(prompt: Prompt) -> str:
    """A prompt as one piece of HTML; of a conversation its last turn."""
    return text(prompt) if isinstance(prompt, str) else _turn(prompt[-1])


def plain(value: Prompt | Reply) -> str:
    """All text of a prompt or a reply."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    return "\n".join(str(turn.get("content") or "") for turn in parts)


def direction(value: Prompt | Reply) -> Direction:
    """The direction of writing, by the first letter that has one; `auto` where none has.

    So the Unicode Bidirectional Algorithm decides, rules P2 and P3 of Unicode Standard Annex 9.
    """
    for letter in plain(value):
        kind = unicodedata.bidirectional(letter)
        if kind in ("L", "R", "AL"):
            return "ltr" if kind == "L" else "rtl"
    return "auto"


def _turn(turn: dict[str, Any]) -> str:
    parts = []
    reasoning = turn.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip():
        parts.append(f'<div class="reasoning">{text(reasoning)}</div>\n')
    content = turn.get("content")
    parts.append(text(content) if isinstance(content, str) else _json(content) if content is not None else "")
    for call in turn.get("tool_calls") or ():
        parts.append(_json(call))
    return "".join(parts)


def _json(value: Any) -> str:
    written = json.dumps(value, ensure_ascii=False, indent=2)
    return _colour(printable(written), "json", "")
