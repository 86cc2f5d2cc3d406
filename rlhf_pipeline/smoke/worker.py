"""What a smoke needs libraries for: a tiny checkpoint, and the first rows of hub datasets. This is where torch lives.

The job is a JSON file; the answer is written beside it as `result.json`.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from rlhf_pipeline import hub
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.schema import Model, Source
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import RESULT
from rlhf_pipeline.smoke import shrink

ROWS_TIMEOUT_S = 20  # of a hub dataset
UNREACHABLE = "the hub does not answer"


def main(job_file: str) -> int:
    """Do the job and write its result.

    Returns:
        0, or 2 for a fault of the recipe.
    """
    job = json.loads(Path(job_file).read_text())
    code = 0
    try:
        result = make_model(Model.model_validate(job["model"]), Path(job["out"]), job["tokenizer"], job["all_layers"])
        sources = [(Source.model_validate(one["source"]), Path(one["file"])) for one in job["hub"]]
        result["rows"] = [write_rows(source, file, job["n"]) for source, file in sources]
    except InputError as error:
        result, code = {"message": error.message, "place": error.place, "hint": error.hint}, 2
    durable.write_text(Path(job_file).with_name(RESULT), json.dumps(result))
    return code


def make_model(spec: Model, out: Path, tokenizer: str | None, all_layers: bool) -> dict[str, Any]:
    """Shrink a model, or write a replacement where it is not available.

    Returns:
        `missing`: why it was not available, else None; `notes`: what else differs from it.

    Raises:
        InputError: see `shrink.shrink`.
    """
    missing = why_missing(spec)
    if missing is None:
        try:
            return {"missing": None, "notes": shrink.shrink(spec, out, tokenizer, all_layers=all_layers)}
        except InputError as error:
            if Path(spec.path).is_dir() or not (constants.HF_HUB_OFFLINE or "gated repo" in error.message):
                raise
            missing = "the model is gated" if "gated repo" in error.message else "the cache has only a part of it"
    words = tokenizer or cached_tokenizer(spec) or shipped_tokenizer()
    shrink.stand_in(out, words)
    return {"missing": missing, "tokenizer": words, "notes": []}


def why_missing(spec: Model) -> str | None:
    """Why a model's configuration is not available; None where it is, or where the hub says what is wrong with it.

    From the first time that the hub does not answer on, only the local cache is asked.
    """
    if Path(spec.path).is_dir():
        return None
    try:
        hub.ask("model", spec.path, spec.revision)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code < 500:
            return None
        reason = "the hub is out of order"
    except Exception:  # offline in one of many ways
        reason = UNREACHABLE
    else:
        return None
    hub.go_offline()
    cached = isinstance(try_to_load_from_cache(spec.path, "config.json", revision=spec.revision), str)
    return None if cached else reason


def cached_tokenizer(spec: Model) -> str | None:
    """The model's id, where the local cache has its tokenizer though not its configuration."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    cached = any(isinstance(try_to_load_from_cache(spec.path, name, revision=spec.revision), str) for name in names)
    return spec.path if cached and spec.revision is None else None


def shipped_tokenizer() -> str:
    """The folder of the tiny checkpoint, for its tokenizer."""
    return str(Path(shrink.__file__).parents[1] / "models" / "tiny" / "checkpoint")


def write_rows(source: Source, file: Path, n: int) -> str | None:
    """Write the first rows of a hub dataset as JSON Lines.

    Returns:
        Why they are not available; None where they are.

    Raises:
        InputError: the hub says that there is no such dataset, subset or split.
    """
    try:
        with _deadline(ROWS_TIMEOUT_S):
            rows = _first_rows(source, n)
    except InputError:
        raise
    except Exception as error:  # as many kinds as there are ways for a network to fail
        if constants.HF_HUB_OFFLINE:
            return UNREACHABLE
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    file.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")
    return None


def _first_rows(source: Source, n: int) -> list[dict[str, Any]]:
    if not constants.HF_HUB_OFFLINE:
        try:
            hub.ask("dataset", source.path, source.revision)
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 404):
                hint = "check the spelling and the network; relative paths start from the recipe's folder"
                raise InputError("there is no such data file or hub dataset", place=source.path, hint=hint) from None
        except Exception:  # offline in one of many ways
            hub.go_offline()
    import datasets  # a second, which a smoke without hub datasets is spared

    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = constants.HF_HUB_OFFLINE
    options: dict[str, Any] = {"name": source.subset, "revision": source.revision}
    if constants.HF_HUB_OFFLINE:
        table = datasets.load_dataset(source.path, split=source.split, **options)
        return table.select(range(min(n, len(table)))).to_list()
    split = re.split(r"[\[+]", source.split)[0]  # streaming knows no slices
    stream = datasets.load_dataset(source.path, split=split, streaming=True, **options)
    return list(itertools.islice(stream, n))


@contextlib.contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
