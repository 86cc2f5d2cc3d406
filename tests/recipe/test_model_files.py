"""Model folders that are not whole, or whose weights are stored in few bits, are told from their headers alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_pipeline import recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import TINY, model_files
from rlhf_pipeline.recipe.model_files import quantization_problem

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1376256\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model."""
    return Path(shutil.copytree(TINY / "checkpoint", tmp_path / "model"))


@pytest.fixture
def parts(model: Path) -> Path:
    """One in two parts, with an index."""
    weights = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    where = {}
    for number, names in enumerate((sorted(weights)[:10], sorted(weights)[10:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, model / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    (model / model_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return model


def refusal(folder: Path) -> InputError:
    """What loading a recipe over a model says."""
    with pytest.raises(InputError) as caught:
        recipe.load("tiny", [f"model.path={folder}"])
    assert "\n" not in caught.value.message
    assert caught.value.place == f"override `model.path={folder}`"
    return caught.value


def test_whole_models_are_taken(model: Path) -> None:
    assert model_files.problem(model) is None


def test_whole_models_in_parts_are_taken(parts: Path) -> None:
    assert model_files.problem(parts) is None


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_not_the_file(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    found = refusal(model)
    assert f"{name} is a Git LFS pointer and not the file itself" in found.message
    assert "git lfs pull" in str(found.hint)


@pytest.mark.parametrize("missing", [1, 1000, "most"])
def test_weights_that_are_cut_off(model: Path, missing: int | str) -> None:
    content = (model / WEIGHTS).read_bytes()
    kept = 10_000 if missing == "most" else len(content) - int(missing)
    (model / WEIGHTS).write_bytes(content[:kept])
    assert f"is cut off: it has {kept:,} bytes, and should have {len(content):,}" in refusal(model).message


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"PK\x03\x04" + b"x" * 2000, b"<!DOCTYPE html><html>" + b" " * 2000],
)
def test_what_is_no_safetensors_file(model: Path, content: bytes) -> None:
    (model / WEIGHTS).write_bytes(content)
    assert "is no safetensors file, or is damaged where it begins" in refusal(model).message


def test_bytes_behind_the_end(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content + b"more")
    assert f"is damaged: it has {len(content) + 4:,} bytes, and should have {len(content):,}" in refusal(model).message


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_link_that_leads_nowhere(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).symlink_to("../blobs/gone")
    assert f"{name} is a link to ../blobs/gone, which is not there" in refusal(model).message


def test_files_that_are_not_read_may_be_anything(model: Path) -> None:
    """The same weights in other formats, of which only pointers were fetched, or links are left."""
    for name in ("pytorch_model.bin", "tf_model.h5", "consolidated.safetensors", "picture.png"):
        (model / name).write_text(POINTER)
    (model / "flax_model.msgpack").symlink_to("../blobs/gone")
    assert recipe.load("tiny", [f"model.path={model}"]).model.path == str(model)


def without_a_part(folder: Path) -> str:
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names"


def without_an_index(folder: Path) -> str:
    (folder / model_files.INDEX).unlink()
    return "index.json is missing, which says what is in model-00001-of-00002.safetensors"


def with_an_index_of_something_else(folder: Path) -> str:
    index = json.loads((folder / model_files.INDEX).read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    (folder / model_files.INDEX).write_text(json.dumps(index))
    return "model-00001-of-00002.safetensors lacks `model.layers.7.mlp.up_proj.weight`"


def with_an_index_that_is_none(folder: Path) -> str:
    (folder / model_files.INDEX).write_text("[]")
    return "is no index of weights"


def with_the_whole_beside(folder: Path) -> str:
    shutil.copy(TINY / "checkpoint" / WEIGHTS, folder / WEIGHTS)
    return "has model.safetensors, and parts of a model with model.safetensors.index.json too"


def with_a_link_to_nowhere(folder: Path) -> str:
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").symlink_to("../blobs/4d7a21")
    return "model-00002-of-00002.safetensors is a link to ../blobs/4d7a21, which is not there"


def under_another_name(folder: Path) -> str:
    for file in folder.glob("model*"):
        file.unlink()
    shutil.copy(TINY / "checkpoint" / WEIGHTS, folder / "consolidated.safetensors")
    return "are called consolidated.safetensors"


@pytest.mark.parametrize(
    "spoil",
    [
        without_a_part,
        without_an_index,
        with_an_index_of_something_else,
        with_an_index_that_is_none,
        under_another_name,
        with_the_whole_beside,
        with_a_link_to_nowhere,
    ],
)
def test_parts_that_do_not_go_together(parts: Path, spoil: Callable[[Path], str]) -> None:
    said = spoil(parts)
    assert said in refusal(parts).message


def test_other_things_than_models_are_called_what_they_are(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes((model / WEIGHTS).read_bytes())
    assert "is an adapter, not a model" in refusal(adapter).message
    (model / WEIGHTS).rename(model / "model-q4.gguf")
    assert "as GGUF, which llama.cpp reads" in refusal(model).message
    (tmp_path / "m.gguf").touch()
    assert "as GGUF, which llama.cpp reads" in refusal(tmp_path / "m.gguf").message


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
PACKED_4 = {"a.weight": "U8", "a.weight.absmax": "U8", "a.weight.quant_map": "F32"} | {
    f"a.weight.{name}": "F32" for name in ("nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
}
PACKED_8 = {"a.weight": "I8", "a.SCB": "F32", "a.weight_format": "U8", "b.weight": "BF16"}


@pytest.mark.parametrize(
    ("stored", "wanted", "found", "said"),
    [
        (None, "none", {"a": "BF16", "b": "I64"}, None),
        (None, "nf4", {"a": "F32"}, None),
        (None, "none", {"a": "BF16", "b": "F8_E4M3"}, "its weights are stored as F8_E4M3, and config.json does not"),
        (NF4, "nf4", PACKED_4, None),
        (INT8, "int8", PACKED_8, None),
        (NF4, "none", {}, "its weights are stored in nf4, and `quantization` is none"),
        (NF4, "int8", {}, "its weights are stored in nf4, and `quantization` is int8"),
        (INT8, "nf4", {}, "its weights are stored in int8, and `quantization` is nf4"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "nf4", {}, "its weights are stored in fp4, over which"),
        ({"load_in_4bit": True}, "nf4", {}, "its weights are stored in fp4, over which"),
        ({"quant_method": "fp8"}, "nf4", {}, "stored quantized by `fp8`, over which adapters are not trained"),
        ({"quant_method": "gptq", "bits": 4}, "none", {}, "stored quantized by `gptq`"),
        ({"quant_method": "awq"}, "int8", {}, "stored quantized by `awq`"),
        ({"quant_method": "mxfp4"}, "none", {}, "stored quantized by `mxfp4`"),
        ({"quant_method": "compressed-tensors"}, "none", {}, "stored quantized by `compressed-tensors`"),
        ({"bits": 4}, "none", {}, "stored quantized by `an unknown method`"),
    ],
)  # fmt: skip
def test_weights_in_few_bits_are_used_as_they_are_stored_or_refused(
    stored: dict[str, Any] | None, wanted: str, found: dict[str, str], said: str | None
) -> None:
    problem = quantization_problem(stored, wanted, found)
    assert (problem and problem.message.partition(said or "!")[1]) == said


def test_a_hint_names_the_setting_that_fits() -> None:
    problem = quantization_problem(NF4, "none", {})
    assert problem is not None
    assert "`model.quantization: nf4`" in problem.hint


def test_the_dtypes_are_those_of_all_parts(parts: Path) -> None:
    weights = load_file(parts / "model-00002-of-00002.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name].to(torch.float64)}, parts / "model-00002-of-00002.safetensors")
    assert model_files.dtypes(parts)[name] == "F64"
    assert set(model_files.dtypes(parts).values()) == {"BF16", "F64"}


@pytest.mark.parametrize("missing", sorted(PACKED_4))
def test_a_weight_in_four_bits_needs_all_its_parts(missing: str) -> None:
    problem = quantization_problem(NF4, "nf4", {name: kind for name, kind in PACKED_4.items() if name != missing})
    assert problem is not None
    assert problem.message == f"the checkpoint has `a.weight` only in part: `{missing}` is missing"


@pytest.mark.parametrize(("missing", "said"), [("a.weight", "a.weight"), ("a.SCB", "a.SCB"), ("a.weight_format", None)])
def test_a_weight_in_eight_bits_needs_its_scales(missing: str, said: str | None) -> None:
    problem = quantization_problem(INT8, "int8", {name: kind for name, kind in PACKED_8.items() if name != missing})
    assert (problem and problem.message) == (
        said and f"the checkpoint has `a.weight` only in part: `{said}` is missing"
    )


@pytest.mark.parametrize(("stored", "wanted"), [(NF4, "nf4"), (INT8, "int8")])
def test_whole_weights_are_not_in_few_bits(stored: dict[str, Any], wanted: str) -> None:
    problem = quantization_problem(stored, wanted, {"a.weight": "BF16"})
    assert problem is not None
    assert f"stored in {wanted}, and they are not quantized" in problem.message
    assert "remove `quantization_config`" in problem.hint
