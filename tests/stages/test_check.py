"""The check opens each data file once for each distinct reading, and what it encodes serves the workers that train."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
from chat_server import MODEL, says, serving

from rlhf_pipeline import plan, stages
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.data import cache
from rlhf_pipeline.errors import InputErrors
from rlhf_pipeline.models import tokenizer as tokenizers
from rlhf_pipeline.recipe import Recipe
from rlhf_pipeline.recipe.schema import AIJudge
from rlhf_pipeline.smoke import cut
from rlhf_pipeline.stages import job as jobs
from rlhf_pipeline.stages.check import check, check_addresses
from rlhf_pipeline.stages.job import Inputs, Job

FILES = ("demonstrations.jsonl", "preferences.jsonl", "prompts.jsonl", "heldout.jsonl")
_opened: Counter[str] = Counter()
_listening = False


def _note(event: str, arguments: tuple) -> None:
    if _listening and event == "open" and isinstance(arguments[0], str | bytes | Path):
        _opened[Path(str(arguments[0])).name] += 1


sys.addaudithook(_note)  # there is no way to take it back


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict[str, int]]]:
    """A function that says how often each data file was opened since it was last asked."""
    global _listening
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    _opened.clear()
    _listening = True

    def since() -> dict[str, int]:
        found = {name: count for name, count in _opened.items() if name in FILES}
        _opened.clear()
        return found

    yield since
    _listening = False


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    """The tiny recipe, planned, as it is when a run begins to check: the digests of its files are known by then."""

    def of(*overrides: str) -> Recipe:
        recipe = recipes.load("tiny", [f"output_dir={tmp_path / 'runs'}", *overrides])
        plan.make(recipe)
        return recipe

    return of


def test_each_data_file_is_opened_once_by_the_check_and_not_again_by_the_stages(load, opened):
    recipe = load()
    opened()
    check(recipe, list(recipe.stages))
    assert opened() == dict.fromkeys(FILES, 1)
    for name, stage in recipe.stages.items():
        inputs = stages.BY_KIND[stage.kind].prepare(Job(recipe, name, recipe.run))
        assert type(inputs) is Inputs and len(inputs.data.train) > 100
    assert opened() == {}


def test_another_limit_is_another_reading_and_another_share_of_held_out_rows_is_not(load, opened):
    recipe = load("dpo.data.max_prompt_length=8", "reward.data.eval_fraction=0.5")
    opened()
    check(recipe, list(recipe.stages))
    assert opened() == dict.fromkeys(FILES, 1) | {"preferences.jsonl": 2}
    recipe = load("reward.data.eval_fraction=0.5")
    check(recipe, list(recipe.stages))
    assert opened() == {"heldout.jsonl": 1}


def test_the_tokenizer_is_loaded_and_hashed_once(load, opened, monkeypatch):
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            calls[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(jobs, "load_tokenizer", counted("loaded", tokenizers.load_tokenizer))
    monkeypatch.setattr(cache, "_tokenizer_hash", counted("hashed", cache._tokenizer_hash))
    recipe = load()
    check(recipe, list(recipe.stages))
    assert calls == {"loaded": 1, "hashed": 1}


def test_a_stage_without_a_learning_rate_is_told_the_default_and_the_usual_one(load):
    warnings = check(load("dpo.trainer={beta: 0.3}"), ["sft", "dpo"])
    (warning,) = (line for line in warnings if "learning_rate" in line)
    assert warning.startswith("stages.dpo.trainer.learning_rate is not set")
    assert "default is used: 1e-06; usual is 5e-6 to 1e-5 (`rlhf-pipeline docs dpo`)" in warning


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("", True),
        (", fsdp_auto_wrap_policy: NO_WRAP", True),
        (", fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP", False),
    ],
)
def test_a_model_that_is_divided_as_one_is_told_what_divides_it_by_layers(load, policy, said):
    recipe = load(f"sft.launch={{num_processes: 2, fsdp_config: {{fsdp_version: 2{policy}}}}}")
    warnings = [line for line in check(recipe, ["sft", "dpo"]) if "all layers at once" in line]
    assert [line.partition(":")[0] for line in warnings] == ["stages.sft"] * said


def test_each_address_of_a_judge_is_asked_once_before_anything_trains(tmp_path: Path) -> None:
    asked = 'kind: judge, data: "tiny:preferences", judge: {model: "%s", served_model: %s}'
    dead = "http://127.0.0.1:9"
    with serving(lambda _: says("A")) as chat:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            "model: {path: tiny, quantization: none}\nstages:\n"
            f"  first: {{{asked % (chat.address, MODEL)}}}\n  second: {{{asked % (chat.address, MODEL)}}}\n"
            f"  third: {{{asked % (dead, MODEL)}}}\n  fourth: {{{asked % (dead, 'other')}}}\n"
        )
        loaded = recipes.load(str(recipe))
        check_addresses(loaded, ["first", "second"])
        assert len(chat.asked) == 1
        with pytest.raises(InputErrors) as error:
            check_addresses(loaded, list(loaded.stages))
    assert [one.place for one in error.value.all] == ["stages.third.judge.model", "stages.fourth.judge.model"]
    assert not loaded.run.exists(), "what is asked only to see whether there is an answer is not kept"


def test_a_smoke_asks_no_address(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    judge = '{model: "http://127.0.0.1:9", served_model: large, principles: default}'
    recipe.write_text(f'model: {{path: tiny}}\nstages: {{judge: {{data: "tiny:preferences", judge: {judge}}}}}\n')
    loaded, notes = recipes.load(str(recipe)), list[str]()
    cut._replace_what_is_outside(loaded, notes)
    assert loaded.stages["judge"].judge == AIJudge(model="base", principles="default")
    assert notes == ["http://127.0.0.1:9 is not asked: the base judges in its place"]
