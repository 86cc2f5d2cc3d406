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


def of_runs(count: int, policies: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    """Runs that share base and sft, and whose further policies are better by the judge the later the run."""
    names = ["base", "sft", *(f"kl_coef={i / 10}: {policy}" for i in range(count) for policy in policies)]
    means = {
        name: {"reward": 1.5, "judge": i / 100, "kl": 0.5, "tokens": 9.0, "ended": 1.0} for i, name in enumerate(names)
    }
    return comparison() | {
        "runs": [
            {
                "label": f"kl_coef={i / 10}",
                "policies": {
                    name.rpartition(": ")[2]: name for name in names if ":" not in name or f"={i / 10}:" in name
                },
            }
            for i in range(count)
        ],
        "policies": names,
        "judge": "my:judge",
        "means": means,
        "win_rates": [
            {"a": a, "b": b, "by": by, "win_rate": 0.3, "low": 0.2, "high": 0.45, "ties": 0.1}
            for j, a in enumerate(names) for b in names[:j] for by in ("judge", "reward")
        ],
        "rows": [{"prompt": f"Question {i}", "replies": {name: reply("So.", 1.0) for name in names}} for i in range(5)],
    } | changes  # fmt: skip


def printed_of_runs(shown: dict[str, Any]) -> list[str]:
    output = io.StringIO()
    reports.show_runs(shown, reports.SHOWN, Console(file=output, width=80))
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_three_runs_are_a_table_and_win_rates_between_them():
    lines = printed_of_runs(of_runs(3, ("ppo", "dpo")))
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["policy", "reward", "judge", "KL", "tokens", "ended"]
    assert [line.split("  ")[0] for line in lines[3:11]] == [
        "base", "sft", *(f"kl_coef=0.{i}: {policy}" for i in range(3) for policy in ("ppo", "dpo"))
    ]  # fmt: skip
    beaten = [line for line in lines if " beats " in line]
    assert len(beaten) == 12 and not any("sft" in line or "base" in line for line in beaten)
    assert not any("0.1: ppo beats kl_coef=0.1" in line for line in beaten)  # that is for a run by itself
    assert sum(line.startswith("Question") for line in lines) == reports.SHOWN


def test_of_twenty_runs_each_policy_is_held_against_the_best():
    lines = printed_of_runs(of_runs(20, ("ppo", "dpo")))
    assert max(map(len, lines)) <= 80 and len(lines) < 220
    beaten = [line for line in lines if " beats " in line]
    assert len(beaten) == 39 and all("beats kl_coef=1.9: dpo" in line for line in beaten)
    # Those that stand the other way round among all pairs are turned.
    text = " ".join(lines)
    assert "kl_coef=0.0: ppo beats kl_coef=1.9: dpo  0.70 [0.55, 0.80]" in text
    assert "partly luck" in text and "replies of 30 more policies are not shown" in text


def test_runs_with_rewards_of_their_own_say_so_and_what_some_share_is_named():
    shown = of_runs(3, ("ppo",), reward=None, reference=None)
    shown["runs"][2]["policies"]["sft"] = "other"
    shown["means"]["sft"] |= {"reward": None}
    text = " ".join(" ".join(printed_of_runs(shown)).split())
    assert "reward: of each run's reward stage" in text and "KL: from the reference of each run" in text
    assert "sft ? 0.010" in text and "sft: the same in kl_coef=0.1" in text
