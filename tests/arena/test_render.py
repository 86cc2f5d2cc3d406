"""What models write is drawn, and can do nothing to the page."""

import html.parser

import pytest

from rlhf_pipeline.arena import render

ALLOWED = {
    "a", "blockquote", "br", "code", "del", "div", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p",
    "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
ATTRIBUTES = {"class", "dir", "href", "rel", "start", "style", "tabindex", "target", "title"}


class Parts(html.parser.HTMLParser):
    """The tags of HTML, with what they have, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "attack",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "![x](https://elsewhere.example/pixel.png)",
        '![x"><script>alert(1)</script>](y "t")',
        "[x](javascript:alert(1)) [y](vbscript:x) [z](data:text/html,<script>alert(1)</script>)",
        "<https://a.example/\"onmouseover='alert(1)'>",
        '[x](https://a.example "onload=alert(1)<script>")',
        "```html\n<script>alert(1)</script>\n```",
        '```"><script>alert(1)</script>\nx\n```',
        "`<script>alert(1)</script>`",
        "| <script>alert(1)</script> |\n|---|\n| <iframe src=x> |",
        "<style>body{display:none}</style><svg onload=alert(1)><a href=javascript:alert(1)>x</a>",
        "&lt;script&gt; &#60;script&#62;",
        "[x]: javascript:alert(1)\n\n[x]",
    ],
)
def test_nothing_that_a_model_writes_can_run_or_load(attack: str) -> None:
    for value in (
        attack,
        {"role": "assistant", "content": attack, "reasoning_content": attack, "tool_calls": [attack]},
    ):
        found = Parts(render.reply(value))
        assert {tag for tag, _ in found.tags} <= ALLOWED
        assert {name for _, attributes in found.tags for name in attributes} <= ATTRIBUTES
        for _, attributes in found.tags:
            assert not (attributes.get("href") or "").lower().startswith(("javascript", "vbscript", "data"))


def test_markdown_and_code_are_drawn() -> None:
    text = "# Title\n\nOne **bold**\nand next\n\n- a\n- b\n\n| x |\n|---|\n| 1 |\n\n```python\ndef f(): ...\n```\n"
    found = render.text(text)
    for part in (
        "<h1>Title</h1>",
        "<strong>bold</strong><br />",
        "<li>a</li>",
        "<td>1</td>",
        '<span class="k">def</span>',
    ):
        assert part in found
    assert '<pre class="code" dir="ltr" tabindex="0"><code>' in found


def test_code_in_an_unknown_language_and_indented_text_stay_text() -> None:
    assert "<code>x &lt; y\n</code>" in render.text("```no-such-language\nx < y\n```")
    assert render.text("    not code") == "<p>not code</p>\n"


def test_a_link_opens_elsewhere_and_says_nothing_of_this_page() -> None:
    ((tag, attributes),) = [part for part in Parts(render.text("[x](https://a.example/)")).tags if part[0] == "a"]
    assert tag == "a" and attributes["rel"] == "noopener noreferrer nofollow" and attributes["target"] == "_blank"


def test_a_picture_is_the_text_that_stands_for_it() -> None:
    assert "[a cat: https://a.example/cat.png]" in Parts(render.text("![a cat](https://a.example/cat.png)")).text


def test_characters_that_turn_the_page_around_are_shown() -> None:
    assert "\u202e" not in render.text("abc \u202e def") and "\x1b" not in render.text("\x1b[2J")


def test_very_long_text_is_shown_as_it_is() -> None:
    found = render.text("[" * (render.LONGEST_MARKDOWN + 1))
    assert found.startswith('<pre class="plain">[[[')


@pytest.mark.parametrize(
    ("text", "direction"),
    [
        ("Hello", "ltr"),
        ("12. שלום", "rtl"),
        ("مرحبا hello", "rtl"),
        ("hello مرحبا", "ltr"),
        ("42?", "auto"),
        ("", "auto"),
    ],
)
def test_the_first_letter_gives_the_direction(text: str, direction: str) -> None:
    assert render.direction(text) == direction
    assert render.direction([{"role": "user", "content": text}]) == direction


def test_turns_have_their_roles_and_all_they_hold() -> None:
    prompt = [
        {"role": "system", "content": "Be *brief*."},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]},
        {"role": "user", "content": "Go"},
    ]
    first, second, third = render.turns(prompt)
    assert first == {"role": "system", "html": "<p>Be <em>brief</em>.</p>\n"}
    assert "look" in Parts(second["html"]).text
    assert render.prompt_html(prompt) == third["html"] == "<p>Go</p>\n"
    assert render.turns("text") == []
    thought = render.reply({"role": "assistant", "content": "yes", "reasoning_content": "Hm."})
    assert thought == '<div class="reasoning"><p>Hm.</p>\n</div>\n<p>yes</p>\n'
