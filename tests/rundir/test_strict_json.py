"""What is written as JSON is JSON for everybody, whatever numbers there are."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.comparison import wanted
from rlhf_pipeline.rundir import jsonl, strict_json
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.rundir.record import Record

PACKAGE = Path(__file__).parents[2] / "rlhf_pipeline"
ODD = {"loss": math.nan, "deep": [{"kl": math.inf}, (-math.inf, 2)], "fine": 0.5, "text": "NaN", "none": None}
PLAIN = {"loss": None, "deep": [{"kl": None}, [None, 2]], "fine": 0.5, "text": "NaN", "none": None}


def strictly(text: str) -> Any:
    """What a reader that knows only JSON makes of it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_becomes_null_and_all_else_stays() -> None:
    assert strictly(strict_json.dumps(ODD)) == PLAIN
    assert math.isnan(ODD["loss"]) and strict_json.dumps([0.1, 1, True, "a"]) == json.dumps([0.1, 1, True, "a"])
    assert strict_json.dumps({"ü": math.nan}, indent=1, ensure_ascii=False) == '{\n "ü": null\n}'
    with pytest.raises(TypeError):
        strict_json.dumps({"loss": math.nan, "what": object()})


def test_no_file_of_a_run_and_no_command_has_a_number_that_json_has_not(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.work("sft").mkdir(parents=True)
    directory.write_record("sft", Record(name="sft", kind="sft", state="done", inputs=ODD, metrics=ODD))
    written = strictly((tmp_path / "sft" / "stage.json").read_text())
    numbers = {name: value for name, value in PLAIN.items() if not isinstance(value, (str, list, dict))}
    assert written["inputs"] == PLAIN and written["metrics"] == numbers
    jsonl.append(tmp_path / "samples.jsonl", [ODD])
    jsonl.rewrite(tmp_path / "samples.jsonl", lambda row: True, [ODD])
    assert [strictly(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [PLAIN, PLAIN]
    (tmp_path / "samples.jsonl").write_text(json.dumps(ODD) + "\n")  # as an earlier version did
    assert jsonl.rows(tmp_path / "samples.jsonl") == [PLAIN]
    (tmp_path / "sft" / "stage.json").write_text(json.dumps({"state": "done", "metrics": ODD}))
    assert directory.record("sft").metrics == numbers
    wanted.write(tmp_path, {"means": ODD})
    assert strictly((tmp_path / "comparison.json").read_text()) == {"means": PLAIN}


@pytest.mark.parametrize("folder", ["cli", "comparison", "use"])
def test_what_is_printed_or_kept_goes_through_the_strict_writer(folder: str) -> None:
    """Numbers reach these from records that an earlier version may have written."""
    for file in (PACKAGE / folder).glob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if re.search(r"(?<!strict_)json\.dumps?\(", line):
                assert file.name in ("card.py", "weights.py") or "sort_keys" in line, f"{file.name}: {line.strip()}"
