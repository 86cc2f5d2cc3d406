"""The page: what it says, in which order, as one file. No torch."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf_pipeline import __version__, kinds
from rlhf_pipeline.report import alarms, charts, figures, frontiers, gather, many, rounds, row_stages, watched
from rlhf_pipeline.report.gather import Run, Stage, mapping, number
from rlhf_pipeline.rundir import diff, durable
from rlhf_pipeline.rundir.headline import Headline, headline, order
from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.rundir.state import DONE
from rlhf_pipeline.rundir.words import duration, memory, memory_beside, printable, short

MOST_PROMPTS = 50  # samples side by side
FIRST_PROMPTS = 12  # of them those that show at once
MOST_OTHER_CURVES = 120  # small ones, of one stage: a trainer with more logs one for each layer
LONGEST_TEXT = 4000  # characters of a prompt or reply; more would be no sample but a book
MEANS = (
    ("reward", "reward"), ("reward_std", "disagreement"), ("judge", "judge"), ("kl", "KL"), ("tokens", "tokens"),
    ("ended", "ended"),
)  # fmt: skip
USES_OF_DATA = {
    "data": "training", "data.eval_data": "held out", "ptx_data": "mixed in", "human": "judged by people",
    "check": "checks of people",
}  # fmt: skip
DIGEST = re.compile(r"(.*)@([0-9a-f]{7,})")


def write(runs: Sequence[Path], file: Path, best: Path | None = None) -> None:
    """Write the report on one run, or on several overlaid; a file that is there is replaced in one step.

    Args:
        runs: run directories in any state; what they lack the page says.
        file: where to write it.
        best: one of them, which is marked where runs are compared; by default the best judged.
    """
    html = render(gather.read_runs(runs), best)
    durable.write_text(file, html.encode("utf-8", "replace").decode("utf-8"))


def render(runs: Sequence[Run], best: Path | None = None) -> str:
    """The page as HTML; see `write`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    environment.globals |= {
        "swatch": charts.swatch, "step_scale": charts.step_scale, "shade_swatch": charts.shade_swatch
    }  # fmt: skip
    names = list(dict.fromkeys(stage.name for run in runs for stage in run.stages))
    found = {run.label: alarms.alarms(run) for run in runs}
    across = frontiers.across(runs, best)
    if many.are_many(runs):
        page = _page_of_many(runs, names, found) | {"frontiers": across}
        return environment.get_template("page.html.jinja").render(page)
    summary = [_summary(run, stage) for name in names for run in runs if (stage := run.stage(name))]
    page = {
        "runs": [_header(run) | {"verdict": alarms.verdict(found[run.label])} for run in runs],
        "several": len(runs) > 1,
        "summary": summary,
        "gated": any(row["gates"] for row in summary),
        "alarms": [(label, alarm) for label, listed in found.items() for alarm in listed],
        "origins": [_origin(run) for run in runs],
        "differences": _differences(runs),
        "frontiers": across,
        "stages": [_stage(runs, name) for name in names],
        "comparison": [*rounds.of_rounds(runs), *figures.of_comparison(runs)],
        "means": _means(runs),
        "settings_of_comparison": [
            (run.label, _settings_of_comparison(run)) for run in runs if run.comparison or gather.comparison_rows(run)
        ],
        "samples": _samples(runs),
        "first_prompts": FIRST_PROMPTS,
        "many": None,
        "made_at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "version": __version__,
    }
    return environment.get_template("page.html.jinja").render(page)


def _page_of_many(runs: Sequence[Run], names: Sequence[str], found: dict[str, list[alarms.Alarm]]) -> dict[str, Any]:
    """What the template gets of more runs than there are colours: see `many`."""
    differing = many.settings(runs)
    order = many.order(runs, differing)
    shared = {name: group for name in names if not many.are_many(group := many.groups(order.runs, name))}
    summary = [_summary(run, stage) for name, group in shared.items() for run in group if (stage := run.stage(name))]
    means, sampled = _means(order.runs), many.sampled(order)
    if means:
        means["rows"] = many.means_once(means["rows"], len(runs))
    settings: dict[str, list[str]] = {}
    for run in order.runs:
        if run.comparison or gather.comparison_rows(run):
            settings.setdefault(_settings_of_comparison(run), []).append(run.label)
    origins = [_origin(run) for run in order.runs]
    facts = many.facts_together([(one["label"], one["facts"]) for one in origins])
    return {
        "runs": [{"label": run.label, "path": str(run.path.absolute())} for run in runs],
        "several": True,
        "many": many.table(order, differing, runs, found, _headline)
        | {"words": order.words, "ends": order.ends, "verdict": many.verdict(found), "facts": _facts_of_many(runs)},
        "summary": summary,
        "gated": any(row["gates"] for row in summary),
        "alarms": many.alarms_together({run.label: found[run.label] for run in order.runs}),
        "origins": [origins[0] | {"facts": facts, "label": f"{origins[0]['label']}, as an example"}],
        "differences": [],
        "stages": [
            _stage(shared[name], name) | {"shared": [run.label for run in shared[name]]}
            if name in shared
            else _stage_of_many(order, name)
            for name in names
        ],
        "comparison": many.of_comparison(order),
        "means": means,
        "settings_of_comparison": [(many.named(labels, len(runs)), words) for words, labels in settings.items()],
        "samples": many.samples_once(_samples(sampled), len(sampled)),
        "first_prompts": FIRST_PROMPTS,
        "made_at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "version": __version__,
    }


def _facts_of_many(runs: Sequence[Run]) -> list[tuple[str, str]]:
    walls = [
        stage.wall_s for run in runs for stage in run.stages if stage.wall_s is not None and not stage.record.taken_from
    ]
    peaks = [peak for run in runs for stage in run.stages if (peak := stage.record.peak_memory_bytes) is not None]
    states = [run.state for run in runs]
    facts = [
        ("runs", ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))),
        ("trained for", duration(sum(walls)) if walls else ""),
        ("peak memory", memory(max(peaks)) if peaks else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _stage_of_many(order: many.Order, name: str) -> dict[str, Any]:
    chosen = [stage for run in order.runs if (stage := run.stage(name))]
    kind = next((stage.kind for stage in chosen if stage.kind), "")
    common = [(key, _value(value)) for key, value in many.common_settings(order.runs, name)]
    return {
        "name": name,
        "kind": known.title if (known := kinds.find(kind)) else "Unknown kind",
        "pictures": many.of_stage(order, name, _headline),
        "numbers": {},
        "people": ([], []),
        "rows": [],
        "others": [],
        "more": 0,
        "settings": {f"all {len(chosen)} runs": common} if common else {},
        "missing": not any(stage.series or stage.rows for stage in chosen),
        "curves": False,
        "state": chosen[0].state,
        "shared": [],
    }


def _finalize(value: Any) -> Any:
    """What becomes of every value that the template prints, before it is escaped."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return "" if value is None else value
    text, left_out = _cut(value)
    return printable(text) + (f"… ({left_out:,} more characters)" if left_out else "")


def _cut(text: str) -> tuple[str, int]:
    """The beginning of a text, and how many characters are not shown."""
    return text[:LONGEST_TEXT], max(0, len(text) - LONGEST_TEXT)


def _header(run: Run) -> dict[str, Any]:
    walls = [stage.wall_s for stage in run.stages if stage.wall_s is not None]
    peaks = [peak for stage in run.stages if (peak := stage.record.peak_memory_bytes) is not None]
    starts = sorted(stage.record.started_at for stage in run.stages if stage.record.started_at)
    ends = sorted(stage.record.finished_at for stage in run.stages if stage.record.finished_at)
    devices = dict.fromkeys(str(device) for stage in run.stages if (device := stage.record.machine.get("device")))
    facts = [
        ("started", _when(starts[0]) if starts else None),
        ("finished" if run.state == "done" else "last stage ended", _when(ends[-1]) if ends else None),
        ("trained for", duration(sum(walls)) if walls else None),
        ("peak memory", memory(max(peaks)) if peaks else None),
        ("device", ", ".join(devices) or None),
    ]
    done = sum(stage.state in DONE for stage in run.stages)
    return {
        "label": run.label,
        "path": str(run.path.absolute()),
        "state": run.state,
        "stages": f"{done} of {len(run.stages)} stages done",
        "at_work": [f"{stage.name}: {_progress(stage)}" for stage in run.stages if stage.state == "running"],
        "facts": [(name, value) for name, value in facts if value],
        "color": 0,
    }


def _progress(stage: Stage) -> str:
    step, of = (number(stage.progress.get(key)) for key in ("step", "of"))
    steps = "" if step is None else f", step {short(step)}" + (f" of {short(of)}" if of else "")
    return f"{stage.progress.get('phase') or 'at work'}{steps}"


def _summary(run: Run, stage: Stage) -> dict[str, Any]:
    numbers = [
        (one.name, None if one.before is None else short(one.before), short(one.after), one.rests_on)
        for one in _headline(run, stage)
    ]
    ignored = stage.record.gates_ignored
    gates = [
        (metric, str(gate.get("bound", "")), "ignored" if metric in ignored else _passed(gate))
        for metric, gate in stage.record.gates.items()
    ]
    return {
        "run": run.label,
        "name": stage.name,
        "kind": stage.kind,
        "state": stage.state,
        "progress": _progress(stage) if stage.state == "running" else "",
        "wall": duration(stage.wall_s),
        "memory": memory_beside(stage.record.peak_memory_bytes, stage.record.forecast_memory_bytes),
        "numbers": numbers,
        "gates": gates,
    }


def _headline(run: Run, stage: Stage) -> list[Headline]:
    """The numbers of a stage that matter."""
    metrics = stage.record.metrics | {metric: stage.final(metric) for metric in order(stage.kind)}
    logged = {key: values.values.tolist() for key in metrics if (values := stage.series.get(key))}
    return headline(stage.kind, metrics, logged, _judged_before(run, stage))


def _passed(gate: dict[str, Any]) -> str:
    passed = gate.get("passed")
    return "passed" if passed is True else "closed" if passed is False else "unknown"


def _judged_before(run: Run, stage: Stage) -> float | None:
    """The judge's mean of the stage that this one started from; the base is not judged on as many prompts."""
    parent = run.stage(stage.parents.get("init", ""))
    return parent.final(kinds.JUDGED) if parent else None


def _origin(run: Run) -> dict[str, Any]:
    model = mapping(run.recipe.get("model"))
    facts: list[tuple[str, str]] = []
    for name, key in (
        ("model", "path"),
        ("revision", "revision"),
        ("quantization", "quantization"),
        ("dtype", "dtype"),
        ("attention", "attention"),
    ):
        if model.get(key) is not None:
            facts.append((name, str(model[key])))
    for stage in run.stages:
        if "model" in stage.record.inputs:
            facts.append(("model's digest", _digest(str(stage.record.inputs["model"]))[1] or "unknown"))
            break
    if "seed" in run.recipe:
        facts.append(("seed", str(run.recipe["seed"])))
    facts += [("taken", f"{stage.name} from {at}") for stage in run.stages if (at := stage.record.taken_from)]
    records = [stage.record for stage in run.stages]
    for name, read in (("command", _command), ("git", _git), ("machine", _machine)):
        facts += [(name, value) for value in dict.fromkeys(filter(None, map(read, records)))]
    for versions in dict.fromkeys(tuple(stage.record.versions.items()) for stage in run.stages):
        if versions:
            facts.append(("versions", ", ".join(" ".join(one) for one in versions)))
    return {"label": run.label, "lineage": figures.of_lineage(run), "facts": facts, "data": list(_data(run))}


def _command(record: Record) -> str:
    return record.command or ""


def _git(record: Record) -> str:
    git = record.git or {}
    return ", ".join(f"{key} {value}" if not isinstance(value, bool) else f"{key}: {'yes' if value else 'no'}"
                     for key, value in git.items() if value is not None)  # fmt: skip


def _machine(record: Record) -> str:
    return ", ".join(
        f"{value} processes" if key == "processes" else str(value) for key, value in record.machine.items() if value
    )


def _data(run: Run) -> Iterator[tuple[str, str, str, str]]:
    """Stage, what the data are for, name and digest."""
    for stage in run.stages:
        kind = kinds.find(stage.kind)
        uses = USES_OF_DATA if kind is None or kind.trains else USES_OF_DATA | {"data": kind.doing}
        for key, what in uses.items():
            for source in stage.record.data(key):
                yield (stage.name, what, *_digest(source))
        judged = stage.record.judging or {}
        if "data" in judged:
            yield (stage.name, f"judged by {judged.get('judge')}", *_digest(str(judged["data"])))


def _digest(text: str) -> tuple[str, str]:
    found = DIGEST.fullmatch(text)
    return (found[1], found[2]) if found else (text, "")


def _stage(runs: Sequence[Run], name: str) -> dict[str, Any]:
    chosen = [stage for run in runs if (stage := run.stage(name))]
    others = figures.others(runs, name)
    kind = next((stage.kind for stage in chosen if stage.kind), "")
    settings = {}
    for run in runs:
        stage = run.stage(name)
        if stage is not None:
            settings[run.label] = [
                (key, _value(value)) for key, value in stage.record.inputs.items() if key not in ("kind", "data")
            ]
    return {
        "name": name,
        "kind": known.title if (known := kinds.find(kind)) else "Unknown kind",
        "pictures": [*figures.of_stage(runs, name), *watched.pictures(runs, name), *row_stages.pictures(runs, name)],
        "numbers": {run.label: found for run in runs if (stage := run.stage(name)) and (found := _of_rows(stage))},
        "people": row_stages.people(chosen[0]) if len(chosen) == 1 else ([], []),
        "rows": [_row(one) for one in row_stages.samples(chosen[0])] if len(chosen) == 1 else [],
        "others": others[:MOST_OTHER_CURVES],
        "more": max(0, len(others) - MOST_OTHER_CURVES),
        "settings": {label: rows for label, rows in settings.items() if rows},
        "missing": not any(stage.series or stage.rows for stage in chosen),
        "curves": any(stage.series for stage in chosen),
        "state": chosen[0].state,
        "shared": [],
    }


def _of_rows(stage: Stage) -> list[tuple[str, str]]:
    """The final numbers of a stage that made rows; of one that trained, curves and the summary show them."""
    return row_stages.numbers(stage) if stage.rows else []


def _row(one: dict[str, Any]) -> dict[str, Any]:
    """A row as the page shows a prompt with its replies."""
    replies = []
    for name, said, numbers in one["replies"]:
        text, left_out = _cut(said)
        replies.append({"policy": name, "text": text, "left_out": left_out, "numbers": numbers, "cut": False})
    return {"prompt": [(role, *_cut(text)) for role, text in one["prompt"]], "replies": replies}


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _means(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Means by policy: of the comparison, or counted from the replies that there are."""
    rows = []
    for run in runs:
        stored = mapping(run.comparison.get("means"))
        for policy in gather.policies(run):
            known = mapping(stored.get(policy))
            values = []
            for key, _ in MEANS:
                value = number(known.get(key))
                of_replies = gather.reply_numbers(run, policy, key)
                values.append(float(np.mean(of_replies)) if value is None and len(of_replies) else value)
            rows.append((run.label, policy, values))
    used = [i for i in range(len(MEANS)) if any(values[i] is not None for *_, values in rows)]
    if not used:
        return None
    return {
        "columns": [MEANS[i][1] for i in used],
        "rows": [
            (label, policy, ["" if (value := values[i]) is None else short(value) for i in used])
            for label, policy, values in rows
        ],
    }


def _settings_of_comparison(run: Run) -> str:
    rows = gather.comparison_rows(run)
    if not run.comparison:
        return (
            f"{len(rows):,} prompts, from what the judge saw of each stage; there is no comparison.json, so no rewards "
            "and no KL: rlhf-pipeline compare makes it"
        )
    settings = mapping(run.comparison.get("settings"))
    words = {
        "prompts": "from {}",
        "max_new_tokens": "up to {} tokens",
        "temperature": "temperature {}",
        "seed": "seed {}",
    }
    said = [form.format(_value(settings[key])) for key, form in words.items() if settings.get(key) is not None]
    reference = run.comparison.get("reference")
    said += [f"KL from {reference}"] if reference else []
    said += [f"judged by {run.comparison['judge']}"] if run.comparison.get("judge") else []
    said += [f"compared by the AI judge {run.comparison['ai_judge']}"] if run.comparison.get("ai_judge") else []
    return ", ".join([f"{len(rows):,} prompts", *said])


def _samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Prompts with their replies side by side; of several runs those prompts that all of them answered, if any."""
    tables = [
        {json.dumps(row.get("prompt"), sort_keys=True): row for row in gather.comparison_rows(run)} for run in runs
    ]
    having = [(run, table) for run, table in zip(runs, tables, strict=True) if table]
    if not having:
        return []
    prompts = [key for key in having[0][1] if all(key in table for _, table in having)] or list(having[0][1])
    samples = []
    for key in prompts[:MOST_PROMPTS]:
        replies = []
        for run, table in having:
            for policy in gather.policies(run) if key in table else []:
                reply = mapping(table[key]["replies"].get(policy))
                if reply:
                    text, left_out = _cut(gather.content(reply.get("text")))
                    replies.append(
                        {
                            "policy": f"{run.label}: {policy}" if len(runs) > 1 else policy,
                            "text": text,
                            "left_out": left_out,
                            "numbers": list(_reply_numbers(reply)),
                            "cut": reply.get("ended") is False,
                        }
                    )
        prompt = [(role, *_cut(text)) for role, text in gather.turns(having[0][1][key].get("prompt"))]
        samples.append({"prompt": prompt, "replies": replies})
    return samples


def _reply_numbers(reply: dict[str, Any]) -> Iterator[tuple[str, str]]:
    listed = (
        ("reward", "reward"),
        ("reward_std", "disagreement"),
        ("kl", "KL"),
        ("judge", "judge"),
        ("tokens", "tokens"),
    )
    for key, words in listed:
        value = number(reply.get(key))
        if value is not None:
            yield words, short(value)


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What differs in settings, data and versions between the first run and each other one."""
    found = []
    for other in runs[1:]:
        rows: dict[tuple[str, str, str], list[str]] = {}
        for stage in diff.compare(runs[0].path, other.path)["stages"]:
            if stage["only_in"]:
                rows["only in " + (runs[0].label if stage["only_in"] == "a" else other.label), "", ""] = [stage["name"]]
            for section in ("settings", "data", "versions"):
                for key, values in stage[section].items():
                    a, b = (_short_value(values[side]) if side in values else "not set" for side in "ab")
                    rows.setdefault((key, a, b), []).append(stage["name"])
        found.append(
            {"a": runs[0].label, "b": other.label, "rows": [(*key, ", ".join(on)) for key, on in rows.items()]}
        )
    return found


def _short_value(value: Any) -> str:
    text, digest = _digest(_value(value))
    return f"{text} ({digest[:8]})" if digest else text


def _when(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return moment.strftime("%Y-%m-%d %H:%M ") + (moment.tzname() or "")
