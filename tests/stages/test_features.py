"""Features of replies: a plain forward pass's hidden states, at the token that a reward model reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.run import jobs
from rlhf_pipeline.rundir import items
from rlhf_pipeline.rundir.items import item
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.stages import features as made
from rlhf_pipeline.use.score import Scorer

ITEMS = [
    item("Q: How does a frog sound?\nA:", [" It is croak. Thank you for asking!", " Ugh. No idea.", " No."]),
    item("Q: What color is a lemon?\nA:", [" Yellow.", " It is green, of course, and it is never yellow."]),
]


@pytest.fixture
def features(monkeypatch, load_staged: Callable[[Model, dict[str, Path]], StagedBase]) -> Callable[..., torch.Tensor]:
    monkeypatch.setattr(made, "StagedBase", load_staged)
    return made.features


@pytest.mark.parametrize("stage", ["base", "sft", "reward"])
def test_they_are_the_last_hidden_states_of_a_plain_forward_pass(tiny_run, features, tokenizer, stage: str) -> None:
    found = features(recipes.of_run(tiny_run), tiny_run, stage, ITEMS)
    plain = AutoModelForCausalLM.from_pretrained(recipes.of_run(tiny_run).model.path, dtype=torch.float32)
    if stage != "base":
        folder = RunDirectory(tiny_run).adapter(stage)
        plain = PeftModel.from_pretrained(plain, str(folder)).base_model.model
    expected = []
    for one in ITEMS:
        for reply in one.replies:
            ids = tokenizer(one.prompt + reply + tokenizer.eos_token, return_tensors="pt").input_ids
            with torch.no_grad():
                expected.append(plain.eval().model(ids).last_hidden_state[0, -1])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_how_many_go_at_once_changes_nothing_but_rounding(tiny_run, features) -> None:
    recipe = recipes.of_run(tiny_run)
    one, all_ = (features(recipe, tiny_run, "sft", ITEMS, batch_size=size) for size in (1, 5))
    torch.testing.assert_close(one, all_, atol=1e-5, rtol=1e-5)


def test_a_reward_models_score_is_its_head_times_its_features(tiny_run, features) -> None:
    recipe = recipes.of_run(tiny_run)
    found = features(recipe, tiny_run, "reward", ITEMS)
    head = adapters.load_head(RunDirectory(tiny_run).adapter("reward"))
    scorer = Scorer(tiny_run, recipe, "reward", None)
    rows = [(0, None, (one.prompt, reply)) for one in ITEMS for reply in one.replies]
    lines = [line for some in scorer.lines(rows, 2, None, lambda _: None) for line in some]
    scores = torch.tensor([line["score"] for line in lines])
    torch.testing.assert_close(head(found)[:, 0].detach(), scores, atol=1e-5, rtol=1e-5)


def test_a_stage_without_an_adapter_is_an_error(tiny_run) -> None:
    with pytest.raises(InputError, match="`nobody` has no adapter"):
        made.features(recipes.of_run(tiny_run), tiny_run, "nobody", ITEMS)


def test_a_worker_writes_them_beside_the_items(tiny_run, features, warm_server, tmp_path) -> None:
    recipe = recipes.of_run(tiny_run)
    items.write(tmp_path / items.ITEMS, ITEMS)
    details = {"init": "dpo", "items": str(tmp_path / items.ITEMS), "folder": str(tmp_path)}
    ended = jobs.do(recipe, warm_server, "features", tmp_path / "job.json", tmp_path / "log.txt", "it", **details)
    assert ended.result == {"replies": 5}
    found = load_file(tmp_path / items.FEATURES)["features"]
    torch.testing.assert_close(found, features(recipe, tiny_run, "dpo", ITEMS), atol=1e-5, rtol=1e-5)
    (tmp_path / items.ITEMS).write_text("{}\n")
    with pytest.raises(InputError, match="this is no item"):
        jobs.do(recipe, warm_server, "features", tmp_path / "job.json", tmp_path / "log.txt", "it", **details)
