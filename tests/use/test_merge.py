"""Merging: in which dtype, into which base, and what is said of what it changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.recipe import TINY, of_run
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.use import merge, merge_effect
from rlhf_pipeline.use.export import export
from rlhf_pipeline.use.weights import write_merged

IDS = torch.randint(5, 1024, (2, 9), generator=torch.Generator().manual_seed(1))
SPEC = Model(path=str(TINY / "checkpoint"), quantization="none")  # stored in bfloat16
LORA = {"r": 4, "target_modules": "all-linear"}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def make(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, torch.Tensor]]:
    """A function that makes an adapter of a given size of change over another, with the logits under it."""

    def adapter(size: float, init: Path | None = None) -> tuple[Path, torch.Tensor]:
        torch.manual_seed(0)
        spec = SPEC.model_copy(update={"dtype": "float32"})
        model = adapters.with_policy_adapter(base.load_base(spec, tokenizer), LORA, init)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += torch.randn_like(parameter) * size
        folder = tmp_path_factory.mktemp("adapter") / "artifact"
        adapters.save_adapter(model, "default", folder, tokenizer)
        return folder, logits(model)

    return adapter


def written(artifact: Path, out: Path, **options: Any) -> tuple[merge.Rounding, Any]:
    """A merged model as it is written, and as Transformers loads it."""
    out.mkdir()
    rounding = write_merged(SPEC, artifact, out, "causal", {}, **options)
    return rounding, AutoModelForCausalLM.from_pretrained(out)


def test_a_change_that_bfloat16_rounds_away_is_merged_in_float32(make: Callable, tmp_path: Path) -> None:
    artifact, expected = make(1e-5)
    change = (expected - logits(AutoModelForCausalLM.from_pretrained(SPEC.path, dtype=torch.float32))).norm()
    rounding, model = written(artifact, tmp_path / "chosen")
    assert (rounding.dtype, rounding.tried) == ("float32", "bfloat16")
    assert rounding.kept is not None and rounding.kept < 0.2
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert (logits(model) - expected).norm() < 0.05 * change
    rounding, model = written(artifact, tmp_path / "rounded", dtype="bfloat16")
    assert (rounding.dtype, {one.dtype for one in model.parameters()}) == ("bfloat16", {torch.bfloat16})
    assert (logits(model.float()) - expected).norm() > 0.5 * change


def test_a_large_change_stays_in_the_checkpoint_s_dtype_and_float32_is_there_for_the_asking(
    make: Callable, tmp_path: Path
) -> None:
    artifact, expected = make(0.1)
    rounding, model = written(artifact, tmp_path / "chosen")
    assert rounding.dtype == "bfloat16" and rounding.kept is not None and rounding.kept > 0.99
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    rounding, model = written(artifact, tmp_path / "exact", dtype="float32")
    assert rounding.dtype == "float32" and {one.dtype for one in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_what_counts_is_what_the_stage_changed_since_its_start(make: Callable, tmp_path: Path) -> None:
    """After a large SFT, a small DPO: of both together little is lost, of the DPO alone all."""
    start, _ = make(0.1)
    artifact, _ = make(1e-5, start)
    whole, _ = written(artifact, tmp_path / "since the base")
    own, _ = written(artifact, tmp_path / "since the start", start=start)
    assert whole.dtype == "bfloat16" and whole.kept is not None and whole.kept > 0.99
    assert own.dtype == "float32" and own.kept == 0.0


def test_how_much_is_kept_is_as_its_formula_says(tokenizer: PreTrainedTokenizerBase) -> None:
    """Of a single layer, whose change is 3/4 of the distance between two numbers of bfloat16 near 1, or 1/4."""
    for part, expected in ((0.75, 1 - (0.25 / 0.75) ** 2), (0.25, 0.0)):
        model: Any = adapters.with_policy_adapter(
            base.load_base(SPEC, tokenizer).bfloat16(), {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}, None
        )
        for layer in (module for module in model.modules() if hasattr(module, "lora_A")):
            layer.get_base_layer().weight.data.fill_(1.0)
            layer.lora_A["default"].weight.data.fill_(1.0)
            layer.lora_B["default"].weight.data.fill_(part * 2**-7)
        assert merge.kept(model, torch.bfloat16, []) == pytest.approx(expected, abs=1e-6)
        assert {layer.get_base_layer().weight.dtype for layer in model.modules() if hasattr(layer, "lora_A")} == {
            torch.bfloat16
        }


@pytest.mark.parametrize("head", ["causal", "score"])
def test_merged_into_the_dequantized_base_it_is_the_model_that_was_judged(
    head: str, make_artifacts: Callable, tmp_path: Path
) -> None:
    artifacts = make_artifacts("llama", "nf4")
    artifact = artifacts.init if head == "causal" else artifacts.reward
    staged = StagedBase(artifacts.spec, {"own": artifact})
    with torch.no_grad(), staged.acting_as("own"):
        expected = staged.causal_lm(input_ids=IDS).logits
    if head == "score":
        view = staged.reward("own")[0]
        with torch.no_grad():
            expected = view.scores(view.hidden_states(IDS)[:, -1])[:, None]
    off = {}
    for dequantized in (True, False):
        out = tmp_path / str(dequantized)
        out.mkdir()
        write_merged(artifacts.spec, artifact, out, head, {}, dequantized=dequantized)
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        auto: Any = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
        off[dequantized] = (logits(auto.from_pretrained(out)) - expected).abs().max() / expected.abs().max()
    assert off[True] < 2e-5
    assert off[False] > 1e-2


def test_weights_of_eight_bits_are_merged_into_as_they_are_read(make_artifacts: Callable, tmp_path: Path) -> None:
    """Each row is 127 steps of its largest number; an 8-bit layer rounds its inputs too, so only weights compare."""
    artifacts, name = make_artifacts("llama", "int8"), "model.layers.0.self_attn.q_proj.weight"
    whole = AutoModelForCausalLM.from_pretrained(artifacts.spec.path).state_dict()[name]
    step = whole.abs().amax(1, keepdim=True) / 127
    off = {}
    for dequantized, expected in ((True, (whole / step).round() * step), (False, whole)):
        out = tmp_path / str(dequantized)
        out.mkdir()
        write_merged(artifacts.spec, artifacts.init, out, "causal", {}, dequantized=dequantized)
        lora = load_file(artifacts.init / "adapter_model.safetensors")
        parts = [lora[f"base_model.model.{name.removesuffix('weight')}lora_{one}.weight"] for one in "BA"]
        merged = load_file(out / "model.safetensors")[name] - 2 * parts[0] @ parts[1]
        off[dequantized] = ((merged - expected) / step).abs()
    assert off[True].mean() < 0.05 and off[False].max() < 1e-3  # bitsandbytes takes the largest in float16
    assert ((whole / step).round() - whole / step).abs().mean() > 0.2  # what the two differ by


# What is said of it


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_what_merging_changed_is_measured_against_the_stage_s_own_policy(run: Path, tmp_path: Path) -> None:
    """What is merged is the stage's model, and then the model that it started from, whose distance training made."""
    recipe, start = of_run(run), run / "sft" / "adapter"
    found = export(run, "dpo", tmp_path / "dpo", merge=True, dtype="float32")["merged"]
    export(run, "sft", tmp_path / "sft", merge=True, dtype="float32", n=0)
    own = found["measured"]
    assert (own["prompts"], own["n"], own["equal_replies"], found["since"]) == ("evaluate.data", 8, 8, "sft")
    assert own["kl"] < 1e-9 < own["kl_of_training"]
    other = merge_effect.of_policy(run, recipe, "dpo", start, tmp_path / "sft", 8)
    assert other["kl"] == pytest.approx(other["kl_of_training"], rel=1e-3)
    assert other["kl_of_training"] == pytest.approx(own["kl_of_training"], rel=1e-6)
    assert other["equal_replies"] < 8


def test_of_a_reward_model_it_is_the_scores_that_are_compared(run: Path, tmp_path: Path) -> None:
    found = export(run, "reward", tmp_path / "out", merge=True, dtype="float32", n=6)["merged"]["measured"]
    assert (found["prompts"], found["n"], found["same_order"]) == ("reward.data", 6, 6)
    assert found["score_difference"] <= found["score_difference_max"] < 1e-4 < found["score_spread"]
    (tmp_path / "over bfloat16").mkdir()
    write_merged(SPEC, run / "reward" / "adapter", tmp_path / "over bfloat16", "score", {}, dtype="float32")
    head = load_file(tmp_path / "over bfloat16" / "model.safetensors")["score.weight"]
    assert torch.equal(head, adapters.load_head(run / "reward" / "adapter").weight)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["score.weight"] = -weights["score.weight"]
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    turned = merge_effect.of_reward(run, of_run(run), "reward", tmp_path / "out", 6)
    assert turned["same_order"] == 0
    assert turned["score_difference_max"] > turned["score_difference"] > found["score_difference"] * 100


def test_the_prompts_are_those_of_the_stage_where_the_run_has_no_evaluate(run: Path, tmp_path: Path) -> None:
    recipe = of_run(run).model_copy(update={"evaluate": None})
    export(run, "dpo", tmp_path / "dpo", merge=True, n=0)
    found = merge_effect.of_policy(run, recipe, "dpo", None, tmp_path / "dpo", 3)
    assert (found["prompts"], found["n"], found["equal_replies"]) == ("dpo.data", 3, 3)


def test_a_model_is_merged_also_where_nothing_can_be_measured(run: Path, tmp_path: Path) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("heldout.jsonl", "gone.jsonl"))
    lines: list[str] = []
    found = export(run, "sft", tmp_path / "out", merge=True, say=lines.append)["merged"]
    assert found["measured"] is None and "gone.jsonl" in found["not_measured"]
    assert any("was not measured" in line for line in lines)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "was not measured" in card and "gone.jsonl" in card and str(run.parent.parent) not in card
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.nn.Module)


def test_options_of_merging_are_refused_where_they_would_do_nothing(run: Path, tmp_path: Path) -> None:
    for options, place in (
        ({"dtype": "float32"}, "--dtype"),
        ({"dequantized": True}, "--dequantized"),
        ({"dequantized": True, "merge": True}, "--dequantized"),
    ):
        with pytest.raises(InputError) as caught:
            export(run, "sft", tmp_path / "out", **options)
        assert caught.value.place == place and caught.value.hint
    assert not (tmp_path / "out").exists()
