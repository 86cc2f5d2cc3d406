"""A run's policies side by side: the same prompts through base and every policy stage, on one loaded base."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline import stages, user_code
from rlhf_pipeline.comparison import wanted
from rlhf_pipeline.comparison.rates import in_pairs, win_rate
from rlhf_pipeline.data.encode import encode_prompts
from rlhf_pipeline.data.prepare import column, first_prompts
from rlhf_pipeline.data.turns import Prompt, typed
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges.bias import Judged, figures
from rlhf_pipeline.judges.load import load
from rlhf_pipeline.models import attention
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.models.roles import PolicyView, ScoreView
from rlhf_pipeline.models.staged import StagedBase, artifacts
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.forward import disagreement, member_scores, reply_log_probs
from rlhf_pipeline.ppo.rollout import Engine, Episodes, sample
from rlhf_pipeline.recipe import Data, Recipe
from rlhf_pipeline.rundir import finished
from rlhf_pipeline.rundir.layout import ANSWERS
from rlhf_pipeline.rundir.secrets import redact
from rlhf_pipeline.stages import engine, win_rates
from rlhf_pipeline.stages.evaluate import PLACE, ask

Asked = list[tuple[Prompt, dict[str, Any]]]
MEASURES = ("reward", "judge", "kl", "tokens", "ended")
BATCH_SIZE = 16  # replies at once, where no `evaluate` says how many


def default_prompts(recipe: Recipe, n: int) -> tuple[Asked, Data]:
    """The prompts that a recipe is compared on, each with its row, and the data that they are of.

    They are the first ones of `evaluate`. Of a stage's data they are distinct, and the held-out ones come first.

    Raises:
        InputError: the data cannot be read.
    """
    name, spec = wanted.default_data(recipe)
    if recipe.evaluate:
        return first_prompts(spec, n), spec
    return prompts_of(recipe, name.removesuffix(".data"), n)


def prompts_of(recipe: Recipe, stage: str, n: int) -> tuple[Asked, Data]:
    """The first distinct prompts of a stage's data, each with its row, and those data; the held-out ones come first.

    Raises:
        InputError: the data cannot be read.
    """
    spec = recipe.stages[stage].data
    prepared = stages.BY_KIND[recipe.stages[stage].kind].read(spec, load_tokenizer(recipe.model), recipe.seed)
    found: Asked = []
    if prepared.held_out_table is not None:
        apart = spec.model_copy(update={"mix": [], **(spec.eval_data.model_dump() if spec.eval_data else {})})
        keys = set(column(prepared.held_out_table, "prompt_key").tolist())
        found = first_prompts(apart if spec.eval_data else spec, n, keys)
    if len(found) < n:
        found += first_prompts(spec, n - len(found), set(column(prepared.table, "prompt_key").tolist()))
    return found, spec


def given_prompts(recipe: Recipe, file: Path | None, texts: Sequence[str], n: int) -> tuple[Asked, Data]:
    """Prompts of a file, in any shape that recipes read, and texts, which are read as the recipe's own prompts are.

    Where those are conversations, a text is a user's turn, which goes through the chat template; else it is text as
    the model reads it; see `typed`.

    Args:
        recipe: the run's.
        file: a file or folder with prompts, of which the first `n` are used.
        texts: prompts, all of which are used.
        n: the most prompts of the file.

    Raises:
        InputError: the file cannot be read, or has no prompts.
    """
    _, like = wanted.default_data(recipe)
    asked: Asked = []
    spec = Data(path="-", chat=like.chat, max_prompt_length=like.max_prompt_length)
    if file is not None:
        spec.path = str(file.absolute())
        asked += first_prompts(spec, n)
    if texts:
        try:
            turns = isinstance(first_prompts(like, 1)[0][0], list)
        except InputError:  # the run may have been made elsewhere
            turns = bool(like.chat)
        asked += [(typed(text, turns), {}) for text in texts]
    return asked, spec


@torch.no_grad()
def compare(
    recipe: Recipe,
    run: Path,
    asked: Asked,
    spec: Data,
    settings: dict[str, Any],
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Send prompts through base and every policy stage of a run, and measure what comes back.

    Every policy samples with the same random numbers, so that policies differ by their weights alone. Of each reply:

    * `kl`: the sum over its tokens of log p(policy) - log p(reference), in nats, both at the temperature that it was
      sampled with (at 1 where that is 0, greedy). Over replies, its mean estimates the KL divergence of the two
      without bias; that of a single reply may be negative. It is PPO's `objective/kl` with `kl_estimator: k1`, and
      the `gold/kl` of `evaluate.along`.
    * `reward`: the reward model's score, raw: without PPO's penalties and normalisation. Of an ensemble it is the mean
      of its members' scores, and `reward_std` their standard deviation, with their number below.
    * `judge`: what the function `evaluate.judge` says.
    * `tokens`: how many it has, with what ends it, and whether anything `ended` it; a stage's replies end as those of
      its training do, see `reply_end.stop_tokens`.

    The AI of `evaluate.ai_judge` compares the replies of each later policy with those of each earlier one.

    Args:
        recipe: the run's.
        run: the run directory.
        asked: prompts, each with its row, whose other columns the judge gets.
        spec: their data: `max_prompt_length` counts.
        settings: what `comparison.json` calls so; `temperature`, `max_new_tokens` and `seed` count here.
        only: policies to send them through, by default all.

    Returns:
        What `comparison.json` holds; see docs/json.md.

    Raises:
        InputError: the model cannot be loaded, or the chat template refuses a prompt.
    """
    made_of = wanted.weights(run, recipe)
    policies, reference, reward = wanted.roles(recipe, list(made_of))
    policies = [name for name in policies if only is None or name in only]
    ai = recipe.evaluate.ai_judge if recipe.evaluate else None
    judging = ai.stage if ai and ai.stage in made_of else None
    needed = [name for name in (*policies, reference, reward, judging) if name]
    spec_of_model = finished.model_of(run, recipe, next(iter(made_of)))  # its template, which may be gone by now
    spec_of_model, instead = attention.available(spec_of_model)
    model = StagedBase(spec_of_model, artifacts(run, list(dict.fromkeys(needed))))
    ids = encode_prompts(model.tokenizer, spec, [prompt for prompt, _ in asked])
    at_once = recipe.evaluate.batch_size if recipe.evaluate else BATCH_SIZE
    longest = max(map(len, ids)) + settings["max_new_tokens"]
    place, rollout = wanted.engine(recipe)
    sampler = engine.start(recipe, rollout, place, policies, longest)
    reference_view, scorer = model.policy(reference), model.reward(reward) if reward else []
    replies: dict[str, list[dict[str, Any]]] = {}
    scores: list[dict[tuple[int, ...], dict[str, float | None]]] = [{} for _ in ids]  # of replies, by their tokens
    for name in policies:
        view = reference_view if name == reference else model.policy(name)
        stops = stop_tokens(model.tokenizer, view.generation_config, finished.trained_with(run, name))
        episodes = _sampled(view, ids, model.tokenizer, settings, stops, at_once, sampler)
        kl, of_members = _measured(episodes, view, reference_view, scorer, settings["temperature"] or 1.0, at_once)
        rewards = _rewards(of_members)
        replies[name] = []
        for row, tokens in enumerate(episodes.tokens):
            # Of the same reply the same score: in a batch of another shape it would be rounded otherwise, and no tie.
            score = scores[row].setdefault(tuple(tokens), rewards[row])
            replies[name].append(
                {
                    "text": model.tokenizer.decode(tokens, skip_special_tokens=True),
                    "tokens": len(tokens),
                    "ended": bool(episodes.ended[row]),
                    "kl": _finite(kl[row]),
                    **score,
                    "judge": None,
                }
            )
    if sampler is not None:
        sampler.close()
    judge, notes = _judged(recipe, asked, replies)
    by_ai, figures_of_ai, more = _judged_by_ai(recipe, run, model, asked, replies)
    measures = (*MEASURES, "reward_std") if len(scorer) > 1 else MEASURES
    return {
        "run": str(run.absolute()),
        "made_of": made_of,
        "settings": settings,
        "policies": policies,
        "reference": reference,
        "reward": reward,
        "judge": judge,
        "ai_judge": None if ai is None or figures_of_ai is None else wanted.name_of(ai),
        "ai_judge_figures": figures_of_ai or {},
        "notes": [*([instead] if instead else []), *notes, *more],
        "rows": [
            {"prompt": prompt, "replies": {name: replies[name][row] for name in policies}}
            for row, (prompt, _) in enumerate(asked)
        ],
        "means": {
            name: {measure: _mean([reply[measure] for reply in replies[name]]) for measure in measures}
            for name in policies
        },
        "win_rates": _win_rates(policies, replies, by_ai),
    }


def _sampled(
    view: PolicyView,
    ids: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    stops: list[int],
    at_once: int,
    sampler: Engine | None,
) -> Episodes:
    torch.manual_seed(settings["seed"])
    return sample(
        view,
        ids,
        response_length=settings["max_new_tokens"],
        temperature=settings["temperature"],
        stop_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        at_once=at_once,
        engine=sampler,
    )


def _measured(
    episodes: Episodes,
    policy: PolicyView,
    reference: PolicyView,
    members: Sequence[ScoreView],
    temperature: float,
    at_once: int,
) -> tuple[list[float], torch.Tensor]:
    """KL in nats of n replies, and their scores by each member of the reward model, float32 `[members, n]`."""
    kl = torch.zeros(len(episodes), device=episodes.ids.device)
    scores = torch.zeros(len(members), len(episodes), device=episodes.ids.device)
    for rows in episodes.parts(at_once):
        some = episodes.select(rows)
        if policy is not reference:
            ours, theirs = (reply_log_probs(view, some, temperature)[0] for view in (policy, reference))
            kl[rows] = (ours - theirs).sum(1)
        scores[:, rows] = member_scores(members, some)
    return kl.tolist(), scores


def _rewards(scores: torch.Tensor) -> list[dict[str, float | None]]:
    """What is written of the reward of n replies: the mean over members, and of an ensemble their standard deviation.

    Args:
        scores: `[members, n]`; without a reward model there are no members.
    """
    if not len(scores):
        return [{"reward": None}] * scores.shape[1]
    found = {"reward": scores.mean(0)} | ({"reward_std": disagreement(scores)} if len(scores) > 1 else {})
    columns = ([_finite(value) for value in values.tolist()] for values in found.values())
    return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]


def _judged(recipe: Recipe, asked: Asked, replies: dict[str, list[dict[str, Any]]]) -> tuple[str | None, list[str]]:
    """Have all replies judged and write it into them.

    Returns:
        The judge's name, None where there is none to be had; and what to say of that.
    """
    name = recipe.evaluate.judge if recipe.evaluate else None
    if name is None:
        return None, []
    try:
        judge = user_code.load(name, recipe.folders, PLACE)
        found = {policy: ask(judge, asked, [reply["text"] for reply in replies[policy]]) for policy in replies}
    except InputError as error:
        return None, [f"no judge: {error.message}"]
    except Exception as error:  # a user's function may fail in any way, and may need columns that these prompts lack
        return None, [redact(f"no judge: `{name}` failed on these prompts: {type(error).__name__}: {error}")]
    for policy, judged in found.items():
        for reply, score in zip(replies[policy], judged, strict=True):
            reply["judge"] = score
    return name, []


def _judged_by_ai(
    recipe: Recipe, run: Path, model: StagedBase, asked: Asked, replies: dict[str, list[dict[str, Any]]]
) -> tuple[dict[tuple[str, str], dict[str, float]], dict[str, float] | None, list[str]]:
    """Have an AI compare the replies of each two policies.

    Returns:
        The rates at which a later policy, named first, wins over an earlier one; the judge's figures over all pairs,
        None where there is no such judge to be had; and what to say of that.
    """
    spec = recipe.evaluate.ai_judge if recipe.evaluate else None
    if spec is None:
        return {}, None, []
    if spec.stage is not None and spec.stage not in model.names:
        return {}, None, [f"no AI judge: stage `{spec.stage}` is not done"]
    texts = {policy: [reply["text"] for reply in replies[policy]] for policy in replies}
    by_pair: dict[tuple[str, str], list[Judged]] = {}
    try:
        judge = load(spec, recipe, win_rates.PLACE, model, run / ANSWERS)
        for earlier, later in in_pairs(list(replies)):
            own = {later: 0, earlier: 1}.get(spec.model)
            by_pair[later, earlier] = win_rates.compared(judge, spec, recipe, asked, texts[later], texts[earlier], own)
    except InputError as error:
        return {}, None, [f"no AI judge: {error.message}"]
    except Exception as error:  # an address may fail in many ways, and a user's function in any
        return {}, None, [redact(f"no AI judge: {type(error).__name__}: {error}")]
    found = [one for judged in by_pair.values() for one in judged]
    if not win_rates.is_legible(found):
        return {}, None, ["no AI judge: none of its answers can be read"]
    rates = {pair: win_rates.rate([one.verdict for one in judged]) for pair, judged in by_pair.items()}
    return {pair: rate for pair, rate in rates.items() if rate}, figures(win_rates.asked_of(found)), []


def _win_rates(
    policies: list[str],
    replies: dict[str, list[dict[str, Any]]],
    by_ai: dict[tuple[str, str], dict[str, float]],
) -> list[dict[str, Any]]:
    """Each later policy against each earlier one, by each measure that there is."""
    found = []
    for earlier, later in in_pairs(policies):
        rates = {
            by: win_rate([reply[by] for reply in replies[later]], [reply[by] for reply in replies[earlier]])
            for by in ("reward", "judge")
        }
        rates["ai_judge"] = by_ai.get((later, earlier))
        found += [{"a": later, "b": earlier, "by": by, **rate} for by, rate in rates.items() if rate]
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
