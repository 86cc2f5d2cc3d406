"""What all tests of data need."""

import datasets
import pytest
from templates import TEMPLATES, save

from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe.schema import Model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what is encoded within the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def loaded(tmp_path):
    """A function that loads a tokenizer with one of `TEMPLATES`, or of another text."""

    def load(name, kind="bytes", **settings):
        folder = save(tmp_path / "model", kind, TEMPLATES.get(name, name))
        return load_tokenizer(Model(path=str(folder), chat_template_kwargs=settings))

    return load
