"""The files of a model folder: are they whole, and how are the weights stored? Only headers are read. No torch.

A safetensors file begins with the length of its header, 8 bytes, and the header, a JSON object with each tensor's
dtype, shape and place in the file (https://github.com/huggingface/safetensors).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

LFS = b"version https://git-lfs.github.com/spec/"  # how the file begins that git keeps in place of a large one
INDEX = "model.safetensors.index.json"
PART = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows
FLOATS = ("F64", "F32", "F16", "BF16")


class Problem(NamedTuple):
    """What is wrong with a model folder, and what to do about it."""

    message: str
    hint: str


DAMAGED = "download it again: `hf download` checks what it has"


def problem(folder: Path) -> Problem | None:
    """What keeps a model folder with `config.json` and `*.safetensors` from being loaded as it was meant to be."""
    links = sorted(file for file in folder.iterdir() if file.is_symlink() and not file.exists())
    if links:
        return Problem(f"{links[0]} is a link to {links[0].readlink()}, which is not there", DAMAGED)
    pointers = sorted(file for file in folder.iterdir() if is_pointer(file))
    if pointers:
        return Problem(
            f"{pointers[0]} is a Git LFS pointer and not the file itself",
            "get the files with `git lfs pull` there, or the model with `hf download`",
        )
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, Mapping[str, Any]] = {}
    for file in files:
        header = _header(file)
        if isinstance(header, Problem):
            return header
        found[file.name] = header
    index, parts = folder / INDEX, [name for name in found if PART.fullmatch(name)]
    if index.is_file() and "model.safetensors" in found:
        hint = "remove one of them: Transformers reads model.safetensors alone"
        return Problem(f"{folder} has model.safetensors, and parts of a model with {INDEX} too", hint)
    if index.is_file():
        return _misses(index, found)
    if parts and "model.safetensors" not in found:
        return Problem(f"{index} is missing, which says what is in {parts[0]} and the other parts", DAMAGED)
    if "model.safetensors" not in found:
        hint = "Transformers reads model.safetensors, or parts of it with an index: save it with `save_pretrained`"
        return Problem(f"the weights in {folder} are called {files[0].name}", hint)
    return None


def is_pointer(file: Path) -> bool:
    """Whether a file is what git keeps in place of a large one."""
    if not file.is_file() or file.stat().st_size > 1024:
        return False
    with file.open("rb") as content:
        return content.read(len(LFS)) == LFS


def _header(file: Path) -> Mapping[str, Any] | Problem:
    """The header of a safetensors file: of each tensor dtype, shape and place."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        try:
            if not 2 <= length <= LONGEST_HEADER:
                raise ValueError
            header = json.loads(content.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return Problem(f"{file} is no safetensors file, or is damaged where it begins", DAMAGED)
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        return Problem(f"{file} is cut off: it has {size:,} bytes, and should have {whole:,}", DAMAGED)
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _misses(index: Path, found: Mapping[str, Mapping[str, Any]]) -> Problem | None:
    """What an index names and is not there."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return Problem(f"{index} is no index of weights", DAMAGED)
    for name, part in where:
        if part not in found:
            return Problem(f"{index.with_name(part)} is missing, which {INDEX} names", DAMAGED)
        if name not in found[part]:
            return Problem(f"{index.with_name(part)} lacks `{name}`, which {INDEX} says is there", DAMAGED)
    return None


def dtypes(folder: Path) -> set[str]:
    """The dtypes of the stored weights, in safetensors' words; of a folder in which `problem` finds none."""
    headers = (_header(file) for file in folder.glob("*.safetensors"))
    return {tensor["dtype"] for header in headers if not isinstance(header, Problem) for tensor in header.values()}


def quantization_problem(stored: Mapping[str, Any] | None, wanted: str, found: set[str]) -> Problem | None:
    """What keeps weights that are stored in few bits from being used as a recipe has it.

    bitsandbytes' own two are used as they are stored. Training over another one needs what that one's kernels do not
    have, or would silently be training over other weights.

    Args:
        stored: the configuration's `quantization_config`; None where there is none.
        wanted: the recipe's `model.quantization`.
        found: from `dtypes`; empty where that is not known.
    """
    if not stored:
        few = sorted(found - set(FLOATS) - {"I64", "I32", "BOOL"})
        if few:
            return Problem(
                f"its weights are stored as {few[0]}, and config.json does not say how to read them",
                "take a checkpoint in bfloat16, float16 or float32",
            )
        return None
    method = str(stored.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in stored else "an unknown method"))
    original = "take the checkpoint that it was made of, in bfloat16: `model.quantization: nf4` makes it as small"
    if method != "bitsandbytes":
        return Problem(f"its weights are stored quantized by `{method}`, over which adapters are not trained", original)
    kind = "int8" if stored.get("load_in_8bit") else str(stored.get("bnb_4bit_quant_type", "fp4"))
    if kind not in ("nf4", "int8"):
        return Problem(f"its weights are stored in {kind}, over which adapters are not trained", original)
    if kind != wanted:
        return Problem(
            f"its weights are stored in {kind}, and `quantization` is {wanted}",
            f"set `model.quantization: {kind}`: they are used as they are stored",
        )
    return None
