"""What a judge is asked, and the files that say what: templates, principles, rubrics."""

from pathlib import Path

import pytest

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges import principles, rubric
from rlhf_pipeline.judges.question import Question, read_template, render

TURNS = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "I."},
    {"role": "user", "content": "Why?"},
]


def test_the_shipped_template_shows_prompt_replies_and_question_in_their_order() -> None:
    text = render(Question("Q: Who?\nA:", "It was I.", "No idea.", "Which is better?", {}), read_template(None, ""))
    parts = ["Q: Who?", "Reply A:\nIt was I.", "Reply B:\nNo idea.", "Which is better?"]
    assert sorted(parts, key=text.index) == parts


def test_an_own_template_has_the_turns_and_the_conversation_as_text(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ turns[-1].content }}|{{ prompt }}|{{ first }}|{{ second }}|{{ question }}")
    text = render(Question(TURNS, "one", "two", "?", {}), read_template(str(file), ""))
    assert text == "Why?|user: Who?\n\nassistant: I.\n\nuser: Why?|one|two|?"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ first }} {{ second }} {{ prmpt }}", "uses `prmpt`, which a question does not have"),
        ("{{ first }} {{ question }}", "does not use `second`, so the judge would not see that reply"),
        ("{% if %}", "the template, line 1, is not valid Jinja"),
    ],
)
def test_a_template_that_cannot_ask_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.jinja").write_text(text)
    with pytest.raises(InputError, match=said):
        read_template(str(tmp_path / "own.jinja"), "stages.judge.judge.template")


def test_a_template_may_stand_in_the_recipe_itself() -> None:
    template = "{{ prompt }}: {{ first }} or {{ second }}"
    assert render(Question("p", "a", "b", "?", {}), read_template(template, "")) == "p: a or b"


def test_a_template_from_elsewhere_reaches_nothing_of_python(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ first }}{{ second }}{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Exception, match="unsafe"):
        render(Question("p", "a", "b", "?", {}), read_template(str(tmp_path / "own.jinja"), ""))


def test_the_shipped_principles_can_judge_criticise_and_revise() -> None:
    found = principles.load("default", "p", needs=principles.PARTS)
    assert len(found) == len(principles.load("default", "p")) >= 10
    assert all(one.judge.startswith("Which reply") and one.judge.endswith("?") for one in found)


def test_one_principle_a_line(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("# ours\nBe honest: say so.\n\n  Be brief.\n")
    honest, brief = principles.load(tmp_path / "own.txt", "p", needs=principles.PARTS)
    assert honest.name == "Be honest: say so." and honest.name in honest.judge and honest.name in honest.critique
    assert brief.name == "Be brief." and brief.name in brief.revision


def test_a_list_of_texts_and_mappings_of_which_those_that_lack_a_needed_part_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "- Be honest.\n- {name: short, judge: Which is shorter}\n- critique: Is it long?\n"
    )
    assert [one.name for one in principles.load(tmp_path / "own.yaml", "p")] == ["Be honest.", "short"]
    assert [one.name for one in principles.load(tmp_path / "own.yaml", "p", needs=["critique"])] == [
        "Be honest.",
        "Is it long?",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no principle"),
        ("# none yet\n\n", "holds no principle"),
        ("[]", "holds no principle"),
        ("- {critique: Why}", "has no principle with `judge`"),
        ("- Be honest.\n- Be honest.", "has the principle 'Be honest.' twice"),
        ("- {judge: Which, revise: Again.}", "principle 1 of .* has the key `revise`, which is not read"),
        ("- Be honest.\n- 3", "principle 2 of .* is neither text nor a mapping"),
        ("- {judge: }", "principle 1 of .* has no text under `judge`"),
    ],
)
def test_principles_that_are_none_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        principles.load(tmp_path / "own.yaml", "stages.judge.judge.principles")
    assert caught.value.place == "stages.judge.judge.principles"


def test_the_shipped_rubric() -> None:
    assert [one.name for one in rubric.load("default", "p")] == [
        "helpfulness",
        "honesty",
        "harmlessness",
        "conciseness",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no dimension"),
        ("name: a", "holds no dimension"),
        ("- name: a", "dimension 1 of .* has no text under `question`"),
        ("- {name: a, question: Which, weight: 0}", "`weight` that is no number above 0"),
        ("- {name: a, question: Which, weigth: 2}", "has the key `weigth`, which is not read"),
        ("- {name: a, question: Which}\n- {name: a, question: Who}", "has the dimension `a` twice"),
    ],
)
def test_a_rubric_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        rubric.load(tmp_path / "own.yaml", "p")
