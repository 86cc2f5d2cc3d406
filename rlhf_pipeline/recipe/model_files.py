"""The files of a model folder: are they whole, and how are the weights stored? Only headers are read. No torch.

A safetensors file begins with the length of its header, 8 bytes, and the header, a JSON object with each tensor's
dtype, shape and place in the file (https://github.com/huggingface/safetensors).
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS = "model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/"  # how the file begins that git keeps in place of a large one
INDEX = "model.safetensors.index.json"
PART = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
READ = (".json", ".model", ".tiktoken", ".jinja", ".txt")  # what is read of a model folder, beside its weights

# How bitsandbytes stores a weight: packed, and beside it what makes numbers of it, under names that begin alike.
FOUR_BITS = re.compile(
    r"(?P<weight>.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
)
EIGHT_BITS = re.compile(r"(?P<module>.+)\.(SCB|weight_format)")


class Problem(NamedTuple):
    """What is wrong with a model folder, and what to do about it."""

    message: str
    hint: str


DAMAGED = "download it again: `hf download` checks what it has"


def no_model(path: Path) -> Problem | None:
    """Why something that is there is not a model folder with weights that are read; None where it is one."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    if found := other_format(str(path), names):
        return found
    if "config.json" not in names:
        return Problem(
            f"{path} is not a model folder: it has no config.json", "name the folder that `save_pretrained` wrote"
        )
    if any(name.endswith(".safetensors") for name in names):
        return None
    return Problem(
        f"{path} holds no *.safetensors weights", "load the model with Transformers and save it with `save_pretrained`"
    )


def other_format(path: str, names: Collection[str]) -> Problem | None:
    """What a folder or a hub repository holds instead of a model that can be trained; None where it may be one.

    Args:
        path: the folder, or the hub id.
        names: of its files, without those in folders below it; of a file its own.
    """
    has = {suffix: name for name in sorted(names, reverse=True) for suffix in (Path(name).suffix,)}
    if ".gguf" in has and ".safetensors" not in has:
        return Problem(
            f"{path} holds a model as GGUF, which llama.cpp reads and nothing trains",
            "take the checkpoint that it was made of: config.json and *.safetensors",
        )
    if "config.json" not in names:
        if "adapter_config.json" not in names:
            return None
        return Problem(
            f"{path} is an adapter, not a model",
            "name the model that it was trained over here, and the adapter as `init` of the stage that starts from it",
        )
    pickled = next((has[suffix] for suffix in PICKLE_SUFFIXES if suffix in has), None)
    if pickled is None or ".safetensors" in has:
        return None
    return Problem(
        f"{path} holds its weights as a pickle, {pickled}, which can run any code when it is opened, so only "
        "*.safetensors are read",
        "if you trust who made it, load model and tokenizer once with Transformers and `save_pretrained` both "
        "to a new folder",
    )


def problem(folder: Path) -> Problem | None:
    """What keeps a model folder with `config.json` and `*.safetensors` from being loaded as it was meant to be.

    Files that are not read, as the same weights in another format, may be anything.
    """
    names = sorted(file.name for file in folder.iterdir())
    for name in names:
        if (name == WEIGHTS or Path(name).suffix in READ) and (found := _not_fetched(folder / name)):
            return found
    if WEIGHTS not in names and INDEX not in names:
        stored = [name for name in names if name.endswith(".safetensors")]
        part = next((name for name in stored if PART.fullmatch(name)), None)
        if part:
            return Problem(f"{folder / INDEX} is missing, which says what is in {part} and the other parts", DAMAGED)
        hint = "Transformers reads model.safetensors, or parts of it with an index: save it with `save_pretrained`"
        return Problem(f"the weights in {folder} are called {stored[0]}", hint)
    if WEIGHTS in names and INDEX in names:
        hint = "remove one of them: Transformers reads model.safetensors alone"
        return Problem(f"{folder} has model.safetensors, and parts of a model with {INDEX} too", hint)
    headers: dict[str, Mapping[str, Any]] = {}
    for file in _weight_files(folder):
        if not (file.exists() or file.is_symlink()):
            return Problem(f"{file} is missing, which {INDEX} names", DAMAGED)
        header = _not_fetched(file) or _header(file)
        if isinstance(header, Problem):
            return header
        headers[file.name] = header
    return None if WEIGHTS in names else _misses(folder / INDEX, headers)


def _weight_files(folder: Path) -> list[Path]:
    """The files that weights are read from, as Transformers chooses; they may be missing."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted({str(part) for part in (_index(folder / INDEX) or {}).values()})]


def _index(file: Path) -> Mapping[str, Any] | None:
    """Which part holds a weight, by the weights' names; None where the file does not say."""
    try:
        where = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return where if isinstance(where, dict) and where else None


def _not_fetched(file: Path) -> Problem | None:
    """Why what is there is only where a file should be."""
    if file.is_symlink() and not file.exists():
        return Problem(f"{file} is a link to {file.readlink()}, which is not there", DAMAGED)
    if not is_pointer(file):
        return None
    return Problem(
        f"{file} is a Git LFS pointer and not the file itself",
        "get the files with `git lfs pull` there, or the model with `hf download`",
    )


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
            whole = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return Problem(f"{file} is no safetensors file, or is damaged where it begins", DAMAGED)
    if size != whole:
        what = "cut off" if size < whole else "damaged"
        return Problem(f"{file} is {what}: it has {size:,} bytes, and should have {whole:,}", DAMAGED)
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _misses(index: Path, found: Mapping[str, Mapping[str, Any]]) -> Problem | None:
    """What an index names and its parts do not hold."""
    where = _index(index)
    if where is None:
        return Problem(f"{index} is no index of weights", DAMAGED)
    for name, part in where.items():
        if name not in found[str(part)]:
            return Problem(f"{index.with_name(str(part))} lacks `{name}`, which {INDEX} says is there", DAMAGED)
    return None


def dtypes(folder: Path) -> dict[str, str]:
    """The dtypes of the stored weights, in safetensors' words, by name; of a folder in which `problem` finds none."""
    headers = (_header(file) for file in _weight_files(folder))
    return {
        name: str(tensor["dtype"])
        for header in headers
        if not isinstance(header, Problem)
        for name, tensor in header.items()
    }


def packed_problem(names: Mapping[str, str], kind: str) -> Problem | None:
    """What keeps weights from being those that bitsandbytes stores.

    Args:
        names: from `dtypes`.
        kind: `nf4` or `int8`.
    """
    packed = packed_weights(names)
    if not packed:
        return Problem(
            f"config.json says that its weights are stored in {kind}, and they are not quantized",
            "remove `quantization_config` from config.json: `model.quantization` alone says how they are loaded",
        )
    for weight in sorted(packed):
        if kind == "int8":
            needs = [weight, f"{weight.removesuffix('weight')}SCB"]
        else:
            twice = [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"]
            needs = [weight, f"{weight}.absmax", f"{weight}.quant_map"]
            needs += twice if names.get(needs[1]) == "U8" or any(name in names for name in twice) else []
            needs.append(f"{weight}.quant_state.bitsandbytes__{kind}")
        for name in needs:
            if name not in names:
                return Problem(f"the checkpoint has `{weight}` only in part: `{name}` is missing", DAMAGED)
    return None


def packed_weights(names: Collection[str]) -> set[str]:
    """The names of the weights that bitsandbytes has stored in few bits, also where they themselves are missing."""
    four = {found["weight"] for name in names if (found := FOUR_BITS.fullmatch(name))}
    return four | {f"{found['module']}.weight" for name in names if (found := EIGHT_BITS.fullmatch(name))}


def quantization_problem(stored: Mapping[str, Any] | None, wanted: str, found: Mapping[str, str]) -> Problem | None:
    """What keeps weights that are stored in few bits from being used as a recipe has it.

    bitsandbytes' own two are used as they are stored. Training over another one needs what that one's kernels do not
    have, or would silently be training over other weights.

    Args:
        stored: the configuration's `quantization_config`; None where there is none.
        wanted: the recipe's `model.quantization`.
        found: from `dtypes`; empty where that is not known.
    """
    if not stored:
        few = sorted(set(found.values()) - set(FLOATS) - {"I64", "I32", "BOOL"})
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
    return packed_problem(found, kind) if found else None
