"""`data` on the terminal: readable without colour, data on standard output, what is doubtful on standard error."""

import io
import json
import os
import re
import sys
from pathlib import Path

import datasets
import pytest
from rich.console import Console

from rlhf_pipeline import cli, recipe
from rlhf_pipeline.models.tokenizer import DEFAULT_TEMPLATE, load_tokenizer, render
from rlhf_pipeline.recipe.schema import Stage
from rlhf_pipeline.recipe.yaml import parse_document
from rlhf_pipeline.stages import check
from rlhf_pipeline.terminal import data as reports

DOCS = Path(__file__).parent.parent.parent / "docs" / "data.md"
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"How large is an elephant [{i}]?"},
            {"role": "assistant", "content": "Very [large] 🐘!\nYes."},
        ]
    }
    for i in range(30)
]
PAIRS = [{"prompt": f"Q {i}:", "chosen": " is so" if i % 2 else " is", "rejected": " not"} for i in range(30)]
EQUAL = [row | {"rejected": row["chosen"]} for row in PAIRS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def written(tmp_path):
    """A function that writes rows for stages, and a recipe of these stages."""

    def write(settings: dict[str, dict], model: dict | None = None, **rows: list[dict]) -> str:
        for name, of_stage in rows.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_stage))
        stages = {name: {"data": {"path": f"{name}.jsonl"} | settings.get(name, {})} for name in rows}
        (tmp_path / "r.yaml").write_text(json.dumps({"model": {"path": "tiny"} | (model or {}), "stages": stages}))
        return str(tmp_path / "r.yaml")

    return write


@pytest.fixture
def command(monkeypatch, capsys):
    """The `rlhf-pipeline` command, in this process: its exit code and what it wrote."""

    def run(*arguments: str, width: int = 120) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            for name, value in os.environ.items():  # the command sets some for the libraries
                patch.setenv(name, value)
            patch.setenv("COLUMNS", str(width))
            patch.setattr(sys, "argv", ["rlhf-pipeline", *arguments])
            capsys.readouterr()
            with pytest.raises(SystemExit) as end:
                cli.main()
        return end.value.code, *capsys.readouterr()

    return run


def shown(report: dict, width: int = 120, **options: object) -> str:
    output = io.StringIO()
    reports.show(report, Console(file=output, width=width, **options))
    return output.getvalue()


def of(path: str, *overrides: str) -> dict:
    loaded = recipe.load(path, overrides)
    return check.data_report(loaded, list(loaded.stages))[0]


def test_every_token_with_loss_stands_in_brackets(written):
    text = shown(of(written({}, sft=CHATS)), width=1000)
    example = text[text.index("the first row") :]
    assert "<|system|>Be kind.<|user|>How large is an elephant [0]?<|assistant|>[" in example
    reply = example[example.index("<|assistant|>") + len("<|assistant|>") :]
    inside = "".join(re.findall(r"\[(\[?[^]]*\]?)\]", reply))
    assert inside == "Very [large] 🐘!↵Yes.<|end|>"


def test_every_turn_that_is_learned_stands_in_brackets(written):
    chats = [{"messages": [*row["messages"], *row["messages"][1:]]} for row in CHATS]
    report = of(written({"sft": {"loss": "all"}}, sft=chats))
    text = shown(report, width=1000)
    example = text[text.index("the first row") :]
    first, second = example.split("<|assistant|>")[1:]
    for reply in (first.partition("<|user|>")[0], second):
        assert "".join(re.findall(r"\[(\[?[^]]*\]?)\]", reply)) == "Very [large] 🐘!↵Yes.<|end|>"
    assert "[" not in first.partition("<|user|>")[2].replace("elephant [0]", "")
    assert re.search(r"learned +all of the assistant's turns: 60 replies *\n", text)
    loss = sum(report["stages"][0]["data"]["example"]["text"]["loss"])
    assert f", {30 * loss:,} of them carry loss\n" in re.sub(" +\n", "\n", text)
    assert re.search(r"^  longest reply ", text, re.MULTILINE)


def test_pairs_and_prompts(written):
    text = shown(of(written({}, sft=PAIRS, reward=PAIRS, ppo=PAIRS, dpo=PAIRS), "ppo.trainer.response_length=9"))
    of_reward, of_ppo, of_dpo = (text[text.index(f"{name}.data") :] for name in ("reward", "ppo", "dpo"))
    assert "Q 0: is[<|end|>]" in of_reward.partition("ppo.data")[0]  # where the score is read
    assert "Q 0:[up to 9 tokens, until <|end|>]" in of_ppo.partition("dpo.data")[0]
    assert "Q 0:[ is][<|end|>]" in of_dpo
    assert "text and two replies" in of_reward
    assert "the chosen reply is longer in 50% of the pairs" in of_reward


def test_a_long_stretch_shows_its_beginning_and_its_end(written):
    rows = [{"prompt": "first" + " is" * 300 + " last:", "completion": " so" * 150}]
    text = shown(of(written({}, sft=rows)), width=4000)
    assert re.search(r"\n\s+first( is)+ … [\d,]+ more tokens … ( is)+ last:\[", text)
    assert re.search(r"\] … [\d,]+ more tokens … \[", text)
    assert "[<|end|>]" in text


def test_rows_cannot_steer_the_terminal(written):
    text = shown(of(written({}, sft=[{"prompt": "a \x1b[2J", "completion": " \x1b[31mred"}])))
    assert "\x1b" not in text
    assert "␛" in text


@pytest.mark.parametrize("width", [80, 140])
def test_it_fits_the_terminal(written, width):
    text = shown(of(written({}, sft=CHATS, reward=PAIRS)), width=width)
    assert max(map(len, text.splitlines())) <= width
    for row in ("prompt", "reply", "chosen", "rejected", "together"):
        assert re.search(rf"^  {row} ", text, re.MULTILINE), row


def test_colour_says_nothing_that_is_not_there_without(written, monkeypatch):
    report = of(written({}, sft=CHATS))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = shown(report, force_terminal=True, color_system="standard")
    assert re.search(r"\x1b\[[\d;]*3\dm", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown(report, force_terminal=True)
    assert not re.search(r"\x1b\[[\d;]*3\dm", plain)
    without = [re.sub(r"\x1b\[[\d;]*m", "", text) for text in (coloured, plain)]
    assert without[0] == without[1] == shown(report)


def test_what_limits_do_is_said(written):
    settings = {"sft": {"max_prompt_length": 5, "max_completion_length": 50}}
    text = shown(of(written(settings, sft=CHATS), "sft.trainer.max_length=10"))
    assert "max_prompt_length 5: 30 (100.0%) cut" in text
    assert "max_completion_length 50: 0 cut" in text
    assert re.search(r"max_length 10: 30 \(100\.0%\) cut", text)


@pytest.mark.parametrize(
    ("template", "said"), [(None, "the model's chat template"), ("{{ messages }}", "the recipe's chat template")]
)
def test_the_template_is_said(written, tmp_path, template, said):
    if template:
        (tmp_path / "mine.jinja").write_text(template)
    report = of(written({}, {"chat_template": "mine.jinja"} if template else {}, sft=CHATS))
    assert f"conversations, through {said}" in shown(report)


class TestCommand:
    def test_warnings_go_to_standard_error_and_leave_the_exit_code(self, written, command):
        path = written({"dpo": {"eval_data": "sft.jsonl"}}, sft=PAIRS, dpo=[*PAIRS, EQUAL[0]])
        code, out, err = command("data", path)
        assert code == 0
        assert "sft.data" in out and "dpo.data" in out
        assert "warning:" not in out
        assert all(line.startswith("warning: ") for line in err.splitlines())
        assert "warning: stages.dpo.data: in 1 of 31 (3%) pairs the two replies are the same" in err
        assert "the prompts of 30 of 30 (100%) held-out rows are trained on" in err

    def test_errors_of_all_stages_are_said_at_once(self, written, command):
        path = written({"sft": {"max_completion_length": 1}}, sft=PAIRS, reward=EQUAL, ppo=[{"prompt": None}])
        code, out, err = command("data", path)
        assert code == 2
        assert "sft.data" in out and "reward.data" in out and "ppo.data" not in out
        assert "error: stages.sft.data: none of the 30 replies ends in EOS" in err
        assert "error: stages.reward.data: in all 30 pairs the two replies are the same" in err
        assert re.search(r"error: .*ppo\.jsonl", err)
        assert "Traceback" not in out + err

    def test_one_stage_and_overrides(self, written, command):
        path = written({}, sft=CHATS, dpo=PAIRS)
        code, out, _ = command("data", path, "dpo.data.max_completion_length=2", "dpo", "--json")  # in any order
        assert code == 0
        (stage,) = json.loads(out)["stages"]
        assert stage["name"] == "dpo"
        assert stage["data"]["limits"]["max_completion_length"] == 2
        code, out, err = command("data", path, "dop")
        assert (code, out) == (2, "")
        assert err == "error: there is no stage `dop`\nhint: there are sft, dpo\n"
        assert [stage["name"] for stage in json.loads(command("data", path, "--json")[1])["stages"]] == ["sft", "dpo"]

    def test_json_holds_errors_and_warnings_too(self, written, command):
        code, out, err = command("data", written({}, sft=CHATS, reward=EQUAL), "--json")
        report = json.loads(out)
        assert code == 2
        assert [error["message"] for error in report["errors"]] == ["in all 30 pairs the two replies are the same"]
        assert [f"warning: {warning}" for warning in report["warnings"]] == [
            line for line in err.splitlines() if line.startswith("warning: ")
        ]
        assert "the prompts of sft are conversations, and those of reward plain text" in err

    def test_a_template_that_refuses_a_conversation_names_its_row(self, written, tmp_path, command):
        (tmp_path / "mine.jinja").write_text(
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
            "{{ m.content }}{% endfor %}"
        )
        rows = [{"messages": CHATS[0]["messages"][1:]}, *CHATS[:3]]
        code, _, err = command("data", written({}, {"chat_template": "mine.jinja"}, sft=rows))
        assert code == 2
        assert "sft.jsonl: row 2: the chat template cannot render this conversation: no system role here" in err
        code, out, _ = command(
            "data", written({"sft": {"bad_rows": "drop"}}, {"chat_template": "mine.jinja"}, sft=rows)
        )
        assert code == 0
        assert "3 bad rows" in out

    def test_prompts_that_are_judged_and_trained_on(self, written, tmp_path, command):
        path = written({}, sft=PAIRS)
        content = json.loads(Path(path).read_text())
        (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"Q {i}:"}) + "\n" for i in range(28, 38)))
        content["evaluate"] = {"data": "asked.jsonl", "judge": "rlhf_pipeline.models.tiny.world:judge", "n": 4}
        Path(path).write_text(json.dumps(content))
        _, out, err = command("data", path)
        assert "warning: evaluate.data: 2 of 4 (50%) of its prompts are trained on in `sft`" in err
        assert out.index("sft.data") < out.index("evaluate.data")

    def test_prompts_that_are_judged_are_shown_as_those_of_a_stage(self, written, tmp_path, command):
        path = written({}, sft=CHATS)
        content = json.loads(Path(path).read_text())
        asked = [{"prompt": "Q?"}, {"prompt": "Why?"}, {"prompt": "Why?"}]
        (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        judge = "rlhf_pipeline.models.tiny.world:judge"
        content["evaluate"] = {"data": "asked.jsonl", "judge": judge, "n": 2, "max_new_tokens": 9}
        Path(path).write_text(json.dumps(content))
        code, out, err = command("data", path, "evaluate")
        assert code == 0 and "evaluate.data" in out and "sft.data" not in out
        for line in ("rows           3; 2 distinct prompts", "prompts are    text, as the model reads it",
                     "a reply has up to 9", "Q?[up to 9 tokens, until <|end|>]"):  # fmt: skip
            assert line in out, out
        assert "evaluate.data: 1 of 3 (33%) prompts repeat an earlier one" in err
        code, out, err = command("data", path, "--json")
        stages = json.loads(out)["stages"]
        assert [(stage["name"], stage["kind"]) for stage in stages] == [("sft", "sft"), ("evaluate", "evaluate")]
        assert stages[1]["data"]["rows"] == 3 and stages[1].keys() == stages[0].keys()
        assert "evaluate.data: the prompts of 2 of 2 (100%) rows are plain text, and those of sft conversations" in err
        content["evaluate"]["data"] = "gone.jsonl"
        Path(path).write_text(json.dumps(content))
        assert command("data", path, "evaluate")[0] == 2


class TestDocs:
    """What docs/data.md says, tried."""

    @pytest.mark.slow
    def test_the_commands_run(self, command):
        block = re.search(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
        lines = [line.partition("#")[0].split() for line in block.splitlines()]
        assert len(lines) == 4
        for line in lines:
            assert line[0] == "rlhf-pipeline"
            code, out, err = command(*line[1:])
            assert code == 0, err
            assert out
            assert "error" not in err

    def test_every_data_block_is_one(self):
        blocks = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
        examples = [
            example for block in blocks for example in re.split(r"^(?=data:)", block, flags=re.MULTILINE) if example
        ]
        assert len(examples) >= 9
        for example in examples:
            content = parse_document(example, "docs")[0]
            stage = Stage.model_validate({"kind": "sft"} | content)
            assert all(source.path for source in stage.data.sources)

    def test_the_default_template_is_as_shown(self):
        text = re.search(r"```\n(System:.*?)```", DOCS.read_text(), re.DOTALL)[1]
        tokenizer = load_tokenizer(str(recipe.TINY / "checkpoint"))
        tokenizer.chat_template = DEFAULT_TEMPLATE
        contents = ["Be brief.", "What is a lemon?", "A fruit.", "Which colour?"]
        turns = [
            {"role": role, "content": content}
            for role, content in zip(["system", "user", "assistant", "user"], contents, strict=True)
        ]
        assert render(tokenizer, turns) == text.replace("<EOS>", tokenizer.eos_token)
