"""`chat`: the stages' own models answer, one at a time on one base, and nothing but replies is on standard output."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from rlhf_pipeline import cli
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.models.tokenizer import DEFAULT_TEMPLATE
from rlhf_pipeline.use import chat as chats
from rlhf_pipeline.use import stream as streaming
from rlhf_pipeline.use.stream import stream

PROMPT = "Q: How does a frog sound?\nA:"
LINE = PROMPT.replace("\n", "\\n")
STAGES = ("sft", "ppo", "dpo")


@pytest.fixture(autouse=True)
def no_bars() -> Iterator[None]:
    """As it is in a process of the command's own, which says so before Transformers is imported."""
    disable_progress_bar()
    yield
    enable_progress_bar()


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A run of one's own."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def load_once(monkeypatch, load_staged) -> None:
    """Have the tests of this file share one base with its adapters, which are the same in every copy of the run."""
    monkeypatch.setattr(chats, "StagedBase", load_staged)


@pytest.fixture
def chat(tmp_path, monkeypatch, capfd, load_once) -> Callable[..., tuple[int, str, str]]:
    """The command itself, with what is typed; returns its exit code and both streams."""

    def command(*arguments: str | Path, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", "chat", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capfd.readouterr()
        return code, said.out, said.err

    return command


@pytest.fixture(scope="module")
def greedy(tiny_run) -> dict[str, str]:
    """What each stage's model replies to the prompt, as Transformers and PEFT alone load it."""
    replies = {}
    for stage in STAGES:
        model = AutoModelForCausalLM.from_pretrained(recipes.TINY / "checkpoint").float()
        model = PeftModel.from_pretrained(model, str(tiny_run / stage / "adapter")).eval()
        tokenizer = AutoTokenizer.from_pretrained(tiny_run / stage / "adapter")
        ids = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")["input_ids"]
        output = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
        replies[stage] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return replies


@pytest.fixture
def conversation(run, load_once) -> Callable[..., chats.Chat]:
    """A function that begins a conversation with the run's models; `said` gets what is no reply."""

    def begin(stage: str = "ppo", said: list[str] | None = None, **options: Any) -> chats.Chat:
        options = {"temperature": 0.0, "max_new_tokens": 24, "system": None} | options
        say = (said if said is not None else []).append
        return chats.Chat(run, recipes.of_run(run), stage, **options, say=say)

    return begin


@pytest.fixture
def as_chat(run) -> None:
    """Have the run's prompts go through the chat template."""
    loaded = recipes.of_run(run)
    for stage in loaded.stages.values():
        stage.data.chat = True
    (run / "recipe.yaml").write_text(recipes.to_yaml(loaded))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_from_a_machine_with_another_attention_is_talked_to_all_the_same(run, chat, greedy):
    loaded = recipes.of_run(run)
    loaded.model.attention = "flash_attention_2"
    (run / "recipe.yaml").write_text(recipes.to_yaml(loaded))
    code, answer, said = chat(run, "--stage", "sft", "-p", LINE, "--temperature", "0", "--max-new-tokens", "24")
    assert (code, answer) == (0, greedy["sft"] + "\n")
    assert said.startswith("note: `flash_attention_2` needs an NVIDIA GPU, and PyTorch finds none here: PyTorch's")


@pytest.mark.parametrize("stage", STAGES)
def test_one_answer_is_the_stages_own_and_stands_alone(stage, run, chat, greedy):
    on_one_line = PROMPT.replace("\n", "\\n")
    answer = chat(run, "--stage", stage, "-p", on_one_line, "--temperature", "0", "--max-new-tokens", "24")
    assert answer == (0, greedy[stage] + "\n", "")


def test_sampling_depends_on_the_seed_alone(run, chat):
    def sampled(*options: str) -> str:
        return chat(run, "-p", PROMPT, "--temperature", "2", "--max-new-tokens", "24", *options)[1]

    assert sampled("--seed", "1") == sampled("--seed", "1") != sampled("--seed", "2")
    assert sampled() != sampled()


def test_settings_are_those_of_evaluate_and_the_last_policy_answers(run, chat, greedy, conversation):
    loaded = recipes.of_run(run)
    loaded.evaluate.temperature, loaded.evaluate.max_new_tokens = 0.0, 3
    (run / "recipe.yaml").write_text(recipes.to_yaml(loaded))
    _, reply, said = chat(run, typed=LINE + "\n")
    assert said.startswith("`dpo` of ")
    assert greedy["dpo"].startswith(reply.rstrip("\n")) and len(reply) < len(greedy["dpo"])
    talk = conversation(temperature=None, max_new_tokens=None)
    talk.ask(PROMPT)
    assert talk.last is not None and len(talk.last[1]) == 3
    loaded.evaluate = None
    (run / "recipe.yaml").write_text(recipes.to_yaml(loaded))
    talk = conversation(temperature=None, max_new_tokens=None)
    assert (talk.temperature, talk.max_new_tokens) == (0.7, 256)


def test_switching_stages_changes_the_model_and_loads_nothing(conversation, capfd, tiny_run):
    """Each stage's logits are those of its adapter loaded apart, on the one base."""
    talk = conversation("sft", temperature=1.5)
    base = talk.base.causal_lm
    weights = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    ids = torch.tensor([talk.tokenizer(PROMPT)["input_ids"]])
    seen, replies = {}, set()
    for stage in (*STAGES, "base", "sft"):
        talk.command("/stage", stage)
        torch.manual_seed(4)
        talk.ask(PROMPT)
        with talk.base.acting_as(talk.stage):
            logits = base(input_ids=ids).logits
        model = AutoModelForCausalLM.from_pretrained(recipes.TINY / "checkpoint").float()
        if stage != "base":
            model = PeftModel.from_pretrained(model, str(tiny_run / stage / "adapter"))
        torch.testing.assert_close(logits, model.eval()(input_ids=ids).logits, rtol=0, atol=1e-4)
        seen[stage] = logits
        prompt, reply = talk.last
        torch.manual_seed(4)
        rows = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=24, do_sample=True, temperature=1.5, top_k=0, top_p=1.0
        )
        assert reply == rows[0, len(prompt) :].tolist()
        replies.add(tuple(reply))
    assert len(replies) > 1
    assert talk.base.causal_lm is base
    assert {name: parameter.data_ptr() for name, parameter in base.named_parameters()} == weights
    for stage in ("ppo", "dpo", "base"):
        assert (seen[stage] - seen["sft"]).abs().max() > 1e-3


@pytest.mark.parametrize("limit", [24, 2])
def test_the_reward_is_that_of_the_tokens_that_were_sampled(limit, conversation, tiny_run):
    """Read at the last one, EOS where the model wrote it; and said where it did not."""
    talk = conversation(max_new_tokens=limit)
    assert talk.reward() == "there is no reply yet"
    talk.ask(PROMPT)
    prompt, reply = talk.last
    model = AutoModelForSequenceClassification.from_pretrained(recipes.TINY / "checkpoint", num_labels=1).float()
    model = PeftModel.from_pretrained(model, str(tiny_run / "reward" / "adapter")).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[*prompt, *reply]])).logits.item()
    number, _, rest = talk.reward().partition(" ")
    assert float(number) == pytest.approx(expected, abs=1e-4)
    ended = reply[-1] == talk.tokenizer.eos_token_id
    assert ("no end" not in rest) is ended
    assert ended or len(reply) == limit


def test_piped_lines_are_turns_and_commands(run, chat, greedy):
    typed = f"/reward\n\n{LINE}\n/reward\n/stage\n/stage sft\n{LINE}\n/nonsense\n/stage gone\n/stage reward\n/help\n"
    code, replies, said = chat(run, "--stage", "ppo", "--temperature", "0", "--max-new-tokens", "24", typed=typed)
    assert code == 0
    assert replies == f"{greedy['ppo']}\n{greedy['sft']}\n"
    lines = said.splitlines()
    assert "plain text" in lines[1] and "\\n" in lines[2]
    assert lines[3] == "there is no reply yet"
    assert lines[4].endswith("by `reward`" if "no end" not in lines[4] else "is")
    assert lines[5] == "`ppo` answers; there are base, sft, ppo, dpo"
    assert lines[6] == "`sft` answers"
    assert lines[7] == "there is no command /nonsense; /help lists them"
    assert lines[8].startswith("error: there is no stage `gone`")
    assert lines[9].startswith("error: `reward` is a reward stage")
    assert lines[10:] == chats.HELP.splitlines()
    assert chat(run, typed=f"/exit\n{LINE}\n")[1] == ""


def test_a_conversation_is_rendered_with_all_its_turns(as_chat, conversation, capfd):
    talk = conversation(system="Be kind.")
    talk.ask("One?")
    first = talk.turns[-1]["content"]
    assert capfd.readouterr().out == first + "\n"
    talk.ask("Two?")
    rendered = f"<|system|>Be kind.<|user|>One?<|assistant|>{first}{talk.tokenizer.eos_token}<|user|>Two?<|assistant|>"
    expected = talk.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert talk.last[0] == expected
    talk.command("/reset", "")
    assert talk.turns == [{"role": "system", "content": "Be kind."}] and talk.last is None


def test_a_conversation_longer_than_the_context_loses_its_oldest_turns(as_chat, conversation):
    said: list[str] = []
    talk = conversation(said=said, system="Be kind.", max_new_tokens=8)
    talk.context = 96
    for number in range(6):
        talk.ask(f"Number {number} of the questions?")
        assert len(talk.last[0]) + 8 <= 96
    assert talk.turns[0]["content"] == "Be kind."
    assert [turn["role"] for turn in talk.turns[1:]] == ["user", "assistant"] * (len(talk.turns) // 2)
    assert talk.turns[-2]["content"] == "Number 5 of the questions?"
    assert len(talk.turns) < 13 and "takes 96 tokens" in said[0]
    kept = list(talk.turns)
    with pytest.raises(chats.InputError, match="and the model takes 96"):
        talk.ask("too long " * 100)
    assert talk.turns == kept


def test_an_empty_prompt_is_said_to_be_one(conversation):
    with pytest.raises(chats.InputError, match="the prompt is empty"):
        conversation().ask("")


def test_plain_text_has_no_memory_and_no_system_turn(conversation, run, chat):
    talk = conversation()
    talk.ask(PROMPT)
    before = talk.last
    talk.ask(PROMPT)
    assert talk.last == before and talk.turns == []
    code, _, said = chat(run, "--system", "Be kind.", "-p", PROMPT)
    assert code == 2 and "plain text" in said
    code, _, said = chat(run, "-p", "")
    assert code == 2 and "the prompt is empty" in said


@pytest.mark.parametrize(
    ("chat", "judged", "own_template", "expected"),
    [
        (None, [{"role": "user", "content": "One?"}], False, True),
        (True, "Q: One?", True, False),
        (True, None, False, True),
        (False, None, True, False),
        (None, None, True, True),
        (None, None, False, False),
    ],
)
def test_without_its_data_a_run_tells_how_its_prompts_are_made(
    chat, judged, own_template, expected, run, tiny_run, conversation
):
    """By those that it was judged on, else by the recipe's word, else by whether the model has a chat template."""
    loaded = recipes.of_run(tiny_run)
    loaded.stages["ppo"].data.path, loaded.stages["ppo"].data.chat = "/nowhere/prompts.jsonl", chat
    (run / "recipe.yaml").write_text(recipes.to_yaml(loaded))
    samples = [{"prompt": "seen in training", "completion": "", "score": 1.0}]
    samples += [{"prompt": judged, "completion": "", "judge": 1.0}] if judged else []
    (run / "ppo" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    if not own_template:
        (run / "ppo" / "adapter" / "chat_template.jinja").write_text(DEFAULT_TEMPLATE)
    talk = conversation()
    assert (talk.is_chat, talk.example) == (expected, judged)


def test_ctrl_c_ends_a_reply_and_keeps_the_conversation(as_chat, conversation, monkeypatch):
    talk = conversation("base", temperature=3.0, max_new_tokens=400)
    torch.manual_seed(0)
    parts: list[str] = []

    def interrupt(text: str) -> None:
        parts.append(text)
        if len(parts) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chats, "show", interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert talk.ask("Tell me all.")
    assert signal.getsignal(signal.SIGINT) is before
    assert 5 <= len(talk.last[1]) <= 6
    assert talk.turns[-1]["content"] == "".join(parts).removesuffix("\n")
    monkeypatch.setattr(chats, "show", lambda _: None)
    assert not talk.ask("And now?")
    assert len(talk.turns) == 4


def test_what_is_shown_while_it_is_sampled_is_the_whole_reply(conversation):
    """Part by part, with characters of several tokens whole."""
    talk = conversation("base")
    for seed in range(3):
        torch.manual_seed(seed)
        parts: list[str] = []
        settings = GenerationConfig(max_new_tokens=60, do_sample=True, temperature=20.0, top_k=0)
        ids, text, _ = stream(talk.base.policy("base"), talk.tokenizer, [5, 6], settings, parts.append)
        assert "".join(parts) == text == talk.tokenizer.decode(ids, skip_special_tokens=True)
        assert "\ufffd" in text  # bytes that make no character, for which it waited
        assert sum(part != "" for part in parts) > 5


def test_a_terminal_sees_prompts_replies_and_no_control_characters(conversation, monkeypatch):
    """A real one, but for the person before it; the model is made to write an escape sequence."""
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals on this platform")
    ours, theirs = pty.openpty()
    said: list[str] = []
    talk = conversation(said=said)
    shown: list[bytes] = []

    def look() -> None:
        with contextlib.suppress(OSError):  # which is how Linux says that it is over
            while some := os.read(ours, 4096):
                shown.append(some)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    decode = talk.tokenizer.decode
    monkeypatch.setattr(talk.tokenizer, "decode", lambda *a, **k: "\x1b[31m" + decode(*a, **k))
    with open(theirs, "r+b", buffering=0, closefd=False) as raw:
        terminal = io.TextIOWrapper(raw, encoding="utf-8", write_through=True)
        monkeypatch.setattr(sys, "stdin", terminal)
        monkeypatch.setattr(sys, "stdout", terminal)
        os.write(ours, f"{LINE}\n/nonsense\x07\n/exit\n".encode())
        assert chats.converse(talk) is False
        terminal.detach()
    os.close(theirs)
    looking.join(timeout=10)
    screen = b"".join(shown).decode()
    assert screen.count("> ") >= 3
    assert "␛[31m" in screen and "\x1b[31m" not in screen
    assert said == ["there is no command /nonsense␇; /help lists them"]


def lose_model(run: Path) -> None:
    loaded = recipes.of_run(run)
    loaded.model.path = "/nowhere/model"
    (run / "recipe.yaml").write_text(recipes.to_yaml(loaded))


def fail(*names: str) -> Callable[[Path], None]:
    def mark(run: Path) -> None:
        for name in names:
            file = run / name / "stage.json"
            failed = {"state": "failed", "artifact": None, "error": "no memory"}
            file.write_text(json.dumps(json.loads(file.read_text()) | failed))

    return mark


WRONG: dict[str, tuple[list[str], Callable[[Path], None], str]] = {
    "no such stage": (["--stage", "gone"], fail("ppo"), "there is no stage `gone`\nhint: stages with a model that"),
    "another kind": (["--stage", "reward"], fail("ppo"), "`reward` is a reward stage\nhint: stages with a model that "),
    "not done": (
        ["--stage", "ppo"],
        fail("ppo"),
        "stage `ppo` is not done but failed: no memory\nhint: stages with a model that answers: ba",
    ),
    "none done": ([], fail(*STAGES), "no stage with a model that answers is done"),
    "no model": ([], lose_model, "model.path: /nowhere/model: this is neither a model folder"),
}


@pytest.mark.parametrize(("options", "spoil", "expected"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_one_error(options, spoil, expected, run, chat):
    spoil(run)
    code, out, said = chat(run, *options, "-p", PROMPT)
    assert (code, out) == (2, "")
    assert expected in said and said.count("error:") == 1 and "Traceback" not in said


def test_a_run_that_broke_off_answers_with_what_is_done(run, chat, greedy):
    fail("ppo", "dpo", "reward")(run)
    code, reply, said = chat(run, "--temperature", "0", "--max-new-tokens", "24", typed=f"{LINE}\n/reward\n")
    assert (code, reply) == (0, greedy["sft"] + "\n")
    assert said.splitlines()[-1] == "no reward stage of this run is done"


def test_half_of_a_character_waits_for_the_other(tokenizer):
    shown: list[str] = []
    ids = tokenizer("gut \N{OWL}\N{LATIN SMALL LETTER U WITH DIAERESIS}!", add_special_tokens=False)["input_ids"]
    assert any(tokenizer.decode(ids[:i]).endswith("\ufffd") for i in range(len(ids)))
    reply = streaming._Reply(tokenizer, shown.append)
    reply.put(torch.tensor([[1, 2]]))  # the prompt
    for one in ids:
        reply.put(torch.tensor([one]))
    reply.end()
    assert "".join(shown) == tokenizer.decode(ids) and "\ufffd" not in "".join(shown)
