"""Forecasts that were made before, kept for the user until something changes that decides them. No torch."""

import contextlib
import functools
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_pipeline import local, plan
from rlhf_pipeline.forecast.cards import Card
from rlhf_pipeline.forecast.result import Forecast, StageForecast
from rlhf_pipeline.recipe.data_files import is_local, matching
from rlhf_pipeline.recipe.schema import Recipe
from rlhf_pipeline.rundir import durable

MOST = 200  # files; the oldest go first


def find(recipe: Recipe, card: Card) -> Forecast | None:
    """What was forecast of a recipe, with what fits on a card; with advice where that was asked for on such a card.

    Args:
        recipe: with the commits of hub models that count; see `fingerprint.pin`.
        card: the GPU.
    """
    digest = _digest(recipe)
    for file in (_file(digest, card.usable), _file(digest, None)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or one that was cut short
            found = Forecast.from_json(json.loads(file.read_text()))
            stages = tuple(one.on(card.usable) for one in found.stages)
            return replace(found, card=card.name, usable=card.usable, stages=stages)
    return None


def keep(recipe: Recipe, forecast: Forecast) -> None:
    """Remember a forecast; where that cannot be written, it is made again the next time.

    Args:
        recipe: as in `find`.
        forecast: of it. Its advice holds for its card, and all else for any.
    """
    digest, file = _digest(recipe), _file("", None)
    plain = replace(
        forecast, usable=None, advised=False, stages=tuple(map(StageForecast.without_advice, forecast.stages))
    )
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(_file(digest, None), json.dumps(plain.as_json()))
        if forecast.advised and forecast.usable is not None:
            durable.write_text(_file(digest, forecast.usable), json.dumps(forecast.as_json()))
        for old in sorted(file.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)[:-MOST]:
            old.unlink(missing_ok=True)


def _file(digest: str, usable: int | None) -> Path:
    folder = local.caches() / "rlhf-pipeline" / "forecasts"
    return folder / (f"{digest}.json" if usable is None else f"{digest}-{usable}.json")


def _digest(recipe: Recipe) -> str:
    """A hash of all that decides a forecast: settings, configuration, size and time of data files, versions."""
    decisive: dict[str, Any] = recipe.model_dump(exclude={"name", "output_dir", "report_to"})
    config = Path(recipe.model.path) / "config.json"
    decisive["config"] = config.read_text(encoding="utf-8") if config.is_file() else None
    data = [one for stage in recipe.stages.values() for one in stage.tables.values()]
    data += [recipe.evaluate.data] if recipe.evaluate else []
    sources = [source for one in data for source in one.sources if source.stage is None and is_local(source.files)]
    files = {str(file): Path(file).stat() for source in sources for file in matching(source.files)}
    decisive["files"] = [(name, found.st_size, found.st_mtime_ns) for name, found in files.items()]
    decisive["made by"] = plan.versions(), _code()
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """A hash of the code that makes forecasts."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
