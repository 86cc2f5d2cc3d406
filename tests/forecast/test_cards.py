"""Which card `--gpu` means."""

import pytest

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.forecast import cards

GIB = 2**30


@pytest.mark.parametrize(
    ("said", "name", "gibibytes"),
    [
        ("24GB", "24 GB", 23.5), ("24 gib", "24 GB", 23.5), ("RTX 4090", "RTX 4090", 23.5), ("4090", "RTX 4090", 23.5),
        ("rtx-3090 ti", "RTX 3090 Ti", 23.5), ("NVIDIA GeForce RTX 3090", "RTX 3090", 23.5), ("l4", "L4", 22.49),
        ("NVIDIA H100 80GB", "H100 80GB", 79.5), ("A100 40GB", "A100 40GB", 39.5), ("Tesla T4", "T4", 15),
        ("H200", "H200", 140.5),
    ],
)  # fmt: skip
def test_a_card_is_known_by_size_and_by_name(said, name, gibibytes):
    card = cards.find(said)
    assert card.name == name
    assert card.usable == pytest.approx(gibibytes * GIB, abs=GIB // 100)


@pytest.mark.parametrize("said", ["24XB", "RTX 9999", "", "0GB", "-1GB", "99999999GB"])
def test_anything_else_is_refused_with_what_could_be_meant(said):
    with pytest.raises(InputError) as error:
        cards.find(said)
    assert error.value.place == "--gpu"
    assert "24GB" in str(error.value.hint)


def test_without_a_name_it_is_the_visible_card_or_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cards.find(None) == cards.ANY
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034'\n")
    tool.chmod(0o755)
    assert cards.find(None) == cards.Card("NVIDIA L4", 23034 * 2**20)
