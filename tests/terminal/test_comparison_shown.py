"""A comparison on the terminal."""

import io
from typing import Any

from rich.console import Console

from rlhf_pipeline.terminal import comparison as reports


def reply(text: str, reward: float | None, **changes: Any) -> dict[str, Any]:
    return {"text": text, "tokens": 7, "ended": True, "kl": 0.25, "reward": reward, "judge": None} | changes


def comparison(**changes: Any) -> dict[str, Any]:
    means = {"reward": 1.5, "judge": None, "kl": -0.125, "tokens": 7.25, "ended": 0.75}
    rate = {"a": "ppo", "b": "sft", "by": "reward", "win_rate": 0.71, "low": 0.6, "high": 0.81, "ties": 0.1}
    return {
        "settings": {"prompts": "evaluate.data", "temperature": 0.7, "max_new_tokens": 24, "seed": 42},
        "policies": ["sft", "ppo"],
        "reference": "sft",
        "reward": "reward",
        "judge": None,
        "rows": [{"prompt": "What?", "replies": {"sft": reply("This.", 1.0), "ppo": reply("That!", 2.0, ended=False)}}],
        "means": {"sft": means, "ppo": means | {"reward": None}},
        "win_rates": [rate],
    } | changes


def printed(shown: dict[str, Any], most: int | None = None, width: int = 80) -> str:
    output = io.StringIO()
    reports.show(shown, most, Console(file=output, width=width))
    return output.getvalue()


def test_means_win_rates_and_replies_are_shown():
    lines = printed(comparison()).splitlines()
    assert lines[0] == "1 prompt of evaluate.data; temperature 0.7, at most 24 tokens, seed 42"
    assert lines[2].split() == ["policy", "reward", "KL", "tokens", "ended"]
    assert lines[3].split() == ["sft", "1.50", "-0.12", "7.2", "75%"]
    assert lines[4].split() == ["ppo", "?", "-0.12", "7.2", "75%"]
    text = "\n".join(lines)
    assert "reward: of stage reward" in text and "KL: from sft" in text and "judge" not in text
    assert "ppo beats sft  0.71 [0.60, 0.81]" in text
    assert "What?\n  sft  reward 1.00  KL 0.25  7 tokens\n    This.\n" in text
    assert text.endswith("  ppo  reward 2.00  KL 0.25  7 tokens, cut\n    That!")


def test_a_judge_has_columns_of_its_own_and_without_a_reward_there_is_none():
    means = {"reward": None, "judge": 0.5, "kl": 0.0, "tokens": 7.0, "ended": 1.0}
    rate = {"a": "ppo", "b": "sft", "by": "judge", "win_rate": 0.5, "low": 0.25, "high": 0.75, "ties": 0.1}
    shown = comparison(reward=None, judge="my:judge", means={"sft": means, "ppo": means}, win_rates=[rate])
    text = printed(shown | {"settings": shown["settings"] | {"temperature": 0.0}})
    assert "evaluate.data; greedy, at most" in text
    assert ["sft", "0.500", "0.00", "7.0", "100%"] in [line.split() for line in text.splitlines()]
    assert "judge: my:judge" in text and "by judge" in text and "by reward" not in text
    both = [rate, rate | {"by": "reward", "a": "dpo"}]
    lines = [line.rstrip() for line in printed(shown | {"win_rates": both}).splitlines()]
    assert "dpo beats sft                     0.50 [0.25, 0.75]" in lines


def test_an_ai_judge_has_a_column_of_win_rates_and_a_line_on_what_it_favours():
    rates = [
        {"a": "ppo", "b": "sft", "by": by, "win_rate": 0.7, "low": 0.55, "high": 0.82, "ties": 0.1}
        for by in ("judge", "ai_judge")
    ]
    figures = {"judge/first_position": 0.81, "judge/agreement": 0.38, "judge/unread": 0.0}
    shown = comparison(ai_judge="large at http://localhost:8000/v1", ai_judge_figures=figures, win_rates=rates)
    lines = [" ".join(line.split()) for line in printed(shown).splitlines()]
    assert "win rate by judge by AI judge" in lines
    assert "ppo beats sft 0.70 [0.55, 0.82] 0.70 [0.55, 0.82]" in lines
    said = (
        "AI judge: large at http://localhost:8000/v1; prefers the reply shown first in 0.81; agrees with itself in 0.38"
    )
    assert said in " ".join(lines) and "could not be read" not in " ".join(lines)
    unread = printed(shown | {"ai_judge_figures": {"judge/unread": 0.25}})
    assert "0.25 of its answers could not be read" in " ".join(unread.split())


def test_only_so_many_prompts_are_shown_and_it_is_said_how_many_there_are():
    row = comparison()["rows"][0]
    rows = [row | {"prompt": f"Question {i}"} for i in range(5)]
    text = printed(comparison(rows=rows), 2)
    assert "Question 1" in text and "Question 2" not in text and "and 3 more" in text
    assert "Question 4" in printed(comparison(rows=rows))


def test_text_of_models_and_data_cannot_steer_the_terminal_and_is_trimmed():
    nasty = "\x1b[31mred [bold]loud[/bold]\x07\r\n next \u202eback"
    turns = [{"role": "system", "content": "Be [link=x]kind[/link]."}, {"role": "user", "content": nasty}]
    long = "begin " + "word " * 200 + "end"
    replies = {"sft": reply(nasty, 1.0), "ppo": reply(long, 1.0)}
    rows = [{"prompt": turns, "replies": replies}, {"prompt": long, "replies": replies | {"sft": reply(" \n", 1.0)}}]
    text = printed(comparison(rows=rows))
    assert max(map(len, text.splitlines())) <= 80
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
    assert "[31mred [bold]loud[/bold]" in text and "next" in text
    flat = " ".join(text.split())
    assert "system: Be [link=x]kind[/link]. user:" in flat
    # Of a long prompt the end, of the two long replies the beginning.
    assert (flat.count("word end"), flat.count("begin word")) == (1, 2)
    assert "(empty)" in text
