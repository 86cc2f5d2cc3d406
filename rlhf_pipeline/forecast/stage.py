"""A stage's own trainer, run on shapes for two steps, and what it held at the peak of each phase."""

import contextlib
import importlib
import importlib.util
import inspect
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_pipeline import stages
from rlhf_pipeline.forecast import lengths as longest
from rlhf_pipeline.forecast import model as bases
from rlhf_pipeline.forecast.divided import Fsdp2, Zero, in_place
from rlhf_pipeline.forecast.lengths import Lengths
from rlhf_pipeline.forecast.shapes import UNCOUNTED, Ledger
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models import divided as models_divided
from rlhf_pipeline.models.base import Head
from rlhf_pipeline.models.roles import PolicyView, Roles, SharedBase
from rlhf_pipeline.models.score_head import new_head
from rlhf_pipeline.ppo.forward import member_scores
from rlhf_pipeline.ppo.numbers import Scores
from rlhf_pipeline.ppo.rollout import TOKENS_AT_ONCE, Episodes, sample
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.recipe.deepspeed import zero_stage
from rlhf_pipeline.recipe.schema import BASE, Recipe, Rollout
from rlhf_pipeline.stages.job import Job

TOKEN = 5  # any token that is no special one
STEPS = 1
Split = dict[str, int]


def peaks(
    recipe: Recipe,
    name: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Lengths,
    layers: int,
    asked_prompt: int | None = None,
) -> dict[str, Split]:
    """What a stage holds at the peak of each phase, by what it is for, in bytes.

    Args:
        recipe: with `model.dtype` as it will be.
        name: the stage.
        config: of the model.
        tokenizer: any; only its special tokens are read.
        lengths: of its texts.
        layers: how many layers the model shall have.
        asked_prompt: tokens of the longest prompt of `evaluate`, where that is known.
    """
    job = Job(recipe, name, recipe.run)
    vocabulary = config.get_text_config().vocab_size
    ledger = Ledger(vocabulary)
    head: Head = "score" if job.stage.facts.makes == "reward" else "causal"
    base = bases.build(recipe.model, config, tokenizer, getattr(torch, recipe.model.dtype), layers, head)
    with tempfile.TemporaryDirectory(prefix="rlhf-pipeline-") as folder, ledger, _optimizer_steps(ledger):
        arrives_in_parts = _arrives_in_parts(job)
        for tensor in base.parameters():
            ledger.count(tensor, "weights", 0 if arrives_in_parts else None)
        for tensor in base.buffers():
            ledger.count(tensor, "weights")
        if arrives_in_parts:
            ledger.phase = UNCOUNTED  # of the memory of the machine
        ledger.making = "adapters"
        if not job.stage.facts.trains:
            _rows_of_replies(job, base, lengths, ledger)
            ledger.peaks.pop(UNCOUNTED, None)
            return ledger.peaks
        args = _settings(job, Path(folder))
        run = _ppo if job.stage.facts.own_loop else _groups if job.stage.facts.samples else _texts
        policy = run(job, args, base, tokenizer, lengths, ledger, Path(folder))
        if policy is not None and recipe.evaluate is not None:
            asked = recipe.evaluate
            lengths = longest.of_prompts(asked.data, asked.max_new_tokens, asked_prompt)
            prompts = [[TOKEN] * lengths.prompt] * min(asked.batch_size, asked.n * asked.samples)
            with ledger.during("judging"), job_precision(recipe):
                _sample(policy, prompts, asked.max_new_tokens, asked.temperature, ledger)
    ledger.peaks.pop(UNCOUNTED, None)
    return ledger.peaks


@contextlib.contextmanager
def tiles_in_place() -> Iterator[None]:
    """As on a GPU: there a kernel folds each tile of TRL's chunked logits where it is, which on a CPU takes copies."""
    if importlib.util.find_spec("trl.kernels") is None:  # earlier versions have whole logits
        yield
        return
    chunked: Any = importlib.import_module("trl.kernels.chunked_logprob")
    usual = chunked._forward_tile, chunked._backward_tile

    def fold(_tile: Tensor, _stride: int, _targets: Tensor, highest: Tensor, total: Tensor, *_: Any, **__: Any) -> None:
        highest.zero_()
        total.fill_(1.0)

    chunked._forward_tile, chunked._backward_tile = fold, lambda *_, **__: None
    try:
        yield
    finally:
        chunked._forward_tile, chunked._backward_tile = usual


@contextlib.contextmanager
def _optimizer_steps(ledger: Ledger) -> Iterator[None]:
    """What is made in an optimizer's step is the optimizer's, and the step is a phase."""
    before: list[str] = []

    def begin(*_: Any) -> None:
        before.append(ledger.phase)
        ledger.phase, ledger.making = "optimizer", "optimizer"

    def end(*_: Any) -> None:
        ledger.phase, ledger.making = before.pop(), None

    hooks = register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _settings(job: Job, folder: Path) -> Any:
    """The stage's own settings, for a few steps on shapes."""
    by_zero_3 = zero_stage(job.recipe.launch_of(job.name).get("deepspeed_config") or {}) == 3
    with in_place(models_divided, "by_zero_3", lambda: by_zero_3):
        args: Any = job.trainer_config(stages.BY_KIND[job.stage.kind].CONFIG)
    only_train(args, STEPS, folder)
    args.dataloader_pin_memory = False
    if job.recipe.model.needs_kernel:  # rows without padding are as many tokens; no kernel reads shapes
        for key in ("packing", "padding_free"):
            setattr(args, key, False)
    args.gradient_accumulation_steps = min(2, args.gradient_accumulation_steps)
    if "generation_batch_size" in job.stage.trainer:  # of all processes
        for key in ("generation_batch_size", "steps_per_generation"):
            setattr(args, key, max(1, getattr(args, key) // job.recipe.processes(job.name)))
    return args


def only_train(args: Any, steps: int, folder: Path) -> None:
    """Set a trainer to take a few steps, none of which is logged, evaluated or saved.

    Args:
        args: the trainer's settings, which are changed.
        steps: how many.
        folder: for what it writes all the same.
    """
    args.output_dir, args.report_to, args.max_steps = str(folder), [], steps
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.eval_on_start = False


def _begin(trainer: Any, model: torch.nn.Module, ledger: Ledger, division: Fsdp2 | Zero | None = None) -> None:
    """Have a trainer's optimizer as it is after its first step, so that the next one is like all others."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before, ledger.phase, ledger.making = ledger.phase, UNCOUNTED, "optimizer"
    if trainer.optimizer is None:
        trainer.create_optimizer_and_scheduler(num_training_steps=STEPS)
    if division is not None:
        division.take_over(trainer.optimizer)
    for parameter in trained if division is None else division.trained:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(
            lambda one: None if one.grad is None else ledger.count(one.grad, "optimizer")
        )
    ledger.phase, ledger.making = before, None


def _texts(
    job: Job, args: Any, base: PreTrainedModel, tokenizer: Any, lengths: Lengths, ledger: Ledger, folder: Path
) -> PolicyView | None:
    """SFT, reward, DPO and KTO: TRL's trainer on rows of the longest texts."""
    count = args.per_device_train_batch_size * args.gradient_accumulation_steps * STEPS
    rows = rows_of(job, max(count, args.per_device_eval_batch_size), lengths)
    held_out = rows.select(range(args.per_device_eval_batch_size)) if job.stage.data.holds_out else None
    if job.stage.facts.makes == "reward":
        model = adapters.with_reward_adapter(base, job.stage.lora, None)
    else:
        model = adapters.with_policy_adapter(base, job.stage.lora, None)
    if job.stage.facts.reads == "feedback":
        args.desirable_weight = args.undesirable_weight = 1.0
    trainer = stages.BY_KIND[job.stage.kind].TRAINER.over(model, args, tokenizer, rows, held_out)
    division = _divided(job, trainer, model, ledger)
    _begin(trainer, model, ledger, division)
    with ledger.during("backward"):
        trainer.train()
    if held_out is not None:
        with ledger.during("evaluation"):
            trainer.evaluate()
    if job.stage.facts.makes == "reward":
        return None
    trainer.optimizer = trainer.lr_scheduler = None  # as it is where the trainer is over, and `judge_policy` begins
    if division is not None and job.recipe.evaluate is not None:
        with ledger.during("judging"):
            division.gather_rest()  # as `stages.sharded.in_step` does
    return PolicyView(Roles(model, {"policy": "default"}), "policy")


def _arrives_in_parts(job: Job) -> bool:
    """Whether the base waits in the memory of the machine until it is divided; see `models.base.load_base`."""
    by_fsdp = bool(job.recipe.launch_of(job.name).get("fsdp_config"))
    needs_whole = by_fsdp and job.stage.trainer.get("precompute_ref_log_probs")  # see `stages.sharded.computing`
    several = job.recipe.processes(job.name) > 1 and job.recipe.divides(job.name)
    return several and job.recipe.model.quantization == "none" and not needs_whole


def _divided(job: Job, trainer: Any, model: PeftModel, ledger: Ledger) -> Fsdp2 | Zero | None:
    """What divides a stage's model among processes, at the start of training; None where nothing does."""
    processes, dtype = job.recipe.processes(job.name), getattr(torch, job.recipe.model.dtype)
    keys = job.recipe.launch_of(job.name)
    fsdp, zero = keys.get("fsdp_config") or {}, keys.get("deepspeed_config")
    if processes == 1 or not (fsdp or zero):
        return None
    if job.recipe.divides(job.name):
        ledger.phase = "load"
    if zero:
        hidden = model.config.get_text_config().hidden_size
        return Zero(model, zero, processes, dtype, hidden, ledger) if zero_stage(zero) in (1, 2, 3) else None
    computes_in = None if dtype == torch.float32 else dtype  # as Accelerate's mixed precision has it
    made = Fsdp2(model, fsdp, processes, computes_in, ledger, not _arrives_in_parts(job))
    made.syncs = lambda: bool(trainer.accelerator.sync_gradients)
    return made


def rows_of(job: Job, count: int, lengths: Lengths) -> Dataset:
    """Rows of the longest texts; every second one is a token shorter, so that batches are padded, as in a run."""

    def ids(length: int) -> list[list[int]]:
        return [[TOKEN] * max(1, length - row % 2) for row in range(count)]

    prompt = [[TOKEN] * lengths.prompt] * count
    whole, reply = ids(lengths.whole), ids(lengths.reply)
    if job.stage.facts.encoding == "demonstrations":
        labels = [[-100] * min(lengths.prompt, len(row) - 1) + row[lengths.prompt :] for row in whole]
        labels = [(label + [TOKEN] * len(row))[: len(row)] for label, row in zip(labels, whole, strict=True)]
        return Dataset.from_dict({"input_ids": whole, "labels": labels})
    if job.stage.facts.encoding == "whole_pairs":
        return Dataset.from_dict({"chosen_ids": whole, "rejected_ids": whole})
    if job.stage.facts.encoding == "pairs":
        return Dataset.from_dict({"prompt_ids": prompt, "chosen_ids": reply, "rejected_ids": reply})
    if job.stage.facts.encoding == "replies":
        good = [row % 2 == 0 for row in range(count)]
        return Dataset.from_dict({"prompt_ids": prompt, "completion_ids": reply, "label": good})
    return Dataset.from_dict({"input_ids": ids(lengths.prompt)})


def _ppo(
    job: Job, args: Any, base: PreTrainedModel, tokenizer: Any, lengths: Lengths, ledger: Ledger, folder: Path
) -> PolicyView | None:
    """PPO: one update of our own trainer, of a few passes."""
    batch = args.per_device_train_batch_size * job.stage.trainer.get("gradient_accumulation_steps", 1)
    at_once = min(batch, args.local_rollout_forward_batch_size)
    read_together = min(at_once, max(1, TOKENS_AT_ONCE // (lengths.prompt + args.response_length)))
    enough = max(2, -(-2 * read_together // args.per_device_train_batch_size))  # more would be the same again
    args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, enough)
    args.num_mini_batches, args.num_ppo_epochs, args.max_steps = 1, 1, STEPS
    args.total_episodes, args.num_sample_generations = None, 0
    args.whiten_rewards = False  # which takes nothing, and these may be too few episodes for it
    ledger.phase = UNCOUNTED
    stored = reward_artifacts(job, base, folder)
    ledger.phase = "load"
    shared = SharedBase(base, job.stage.lora, None, stored, one_trunk=job.stage.value_model == "head")
    rows = rows_of(job, args.per_device_train_batch_size * args.gradient_accumulation_steps, lengths)
    trainer = PPOTrainer(args, tokenizer, shared, Rewards(shared), train_dataset=rows)
    _begin(trainer, trainer.model, ledger)

    def roll_out(prompts: list[list[int]], *_: Any) -> Episodes:
        with ledger.during("sampling"), trainer._precision():
            together = [[TOKEN] * lengths.prompt] * at_once
            _sample(shared.policy, together, args.response_length, args.temperature, ledger, job.stage.rollout)
        return _episodes(len(prompts), lengths.prompt, args.response_length)

    usual = trainer.score

    def score(*given: Any, **named: Any) -> Any:
        with ledger.during("scoring"):
            return usual(*given, **named)

    trainer.roll_out, trainer.score = roll_out, score  # type: ignore[method-assign, assignment]
    with ledger.during("backward"):
        trainer.train()
    return shared.policy


def _groups(
    job: Job, args: Any, base: PreTrainedModel, tokenizer: Any, lengths: Lengths, ledger: Ledger, folder: Path
) -> PolicyView | None:
    """GRPO and RLOO: TRL's trainers, as `stages.groups` has them."""
    rows = rows_of(job, max(2, args.generation_batch_size), lengths)
    ledger.phase = UNCOUNTED
    stored = reward_artifacts(job, base, folder)
    ledger.phase = "load"
    model = adapters.with_policy_adapter(base, job.stage.lora, None)
    trainer: Any = stages.BY_KIND[job.stage.kind].TRAINER.over(model, args, tokenizer, rows, None)
    for artifact, shape in stored:
        trainer.roles.add_reward(artifact, shape)
    trainer.score_with(Rewards(trainer.roles), job.stage.scored_by)
    _begin(trainer, model, ledger)

    def roll_out(prompts: list[list[int]], *_: Any) -> Episodes:
        with ledger.during("sampling"), trainer.accelerator.autocast():
            rollout = job.stage.rollout
            _sample(trainer.policy, prompts, args.max_completion_length, args.temperature, ledger, rollout)
        return _episodes(len(prompts), lengths.prompt, args.max_completion_length)

    usual = trainer._generate_and_score_completions

    def score(inputs: Any) -> Any:
        with ledger.during("scoring"):
            return usual(inputs)

    trainer.roll_out, trainer._generate_and_score_completions = roll_out, score
    with ledger.during("backward"):
        trainer.train()
    policy: PolicyView = trainer.policy
    return policy


def _rows_of_replies(job: Job, base: PreTrainedModel, lengths: Lengths, ledger: Ledger) -> None:
    """Stages that make rows: sampled replies, and what reads them."""
    stage = job.stage
    adapted = [name for name in {*stage.parents.values()} if name != BASE]
    peft: Any = None
    shapes = [job._lora_of(name) for name in adapted] or [job.recipe.lora]
    for number, shape in enumerate(shapes):
        config = adapters.lora_config({**shape, "lora_dropout": 0.0}, base)
        if peft is None:
            peft = get_peft_model(base, config, adapter_name="adapter0")
        else:
            peft.add_adapter(f"adapter{number}", config)
    ledger.making = None
    view = PolicyView(Roles(peft, {"policy": "adapter0"}), "policy")
    if stage.sampling is not None:
        prompts = [[TOKEN] * lengths.prompt] * stage.sampling.batch_size
        with ledger.during("sampling"), job_precision(job.recipe):
            sampling = stage.sampling
            _sample(view, prompts, sampling.max_new_tokens, sampling.temperature, ledger, stage.rollout)
    readers = stage.judge.batch_size if stage.judge is not None and stage.judge.is_local else 0
    readers = readers or (stage.sampling.batch_size if stage.sampling and stage.scored_by else 0)
    if readers:
        with ledger.during("scoring"), job_precision(job.recipe), torch.no_grad():
            hidden = view.hidden_states(torch.full((readers, lengths.whole), TOKEN))
            if stage.judge is not None:
                view.head(hidden[:, -1]).float().log_softmax(1)


def job_precision(recipe: Recipe) -> contextlib.AbstractContextManager[Any]:
    """The arithmetic of what samples and scores; see `models.staged`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=recipe.model.dtype == "bfloat16")


class Rewards:
    """The reward models of a stage read the replies, as `rewards.mixture.Rewards` has them do it; nothing else does."""

    def __init__(self, roles: Roles) -> None:
        self.roles = roles

    def __call__(
        self, episodes: Episodes, rows: Any = None, *, at_once: int, step: int = 0, max_steps: int = 0
    ) -> Scores:
        """Read the replies; every score is 0."""
        for members in self.roles.rewards:
            for part in episodes.parts(at_once):
                member_scores(members, episodes.select(part))
        none = torch.zeros(len(episodes))
        return Scores(none, defaultdict(lambda: none), {})


def reward_artifacts(job: Job, base: PreTrainedModel, folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Artifacts of reward models of the right shapes on the disk, for our own code to load."""
    stored = []
    for number, (_, shape) in enumerate(job.reward_models):
        artifact = folder / f"reward-{number}"
        artifact.mkdir()
        peft = adapters.with_policy_adapter(base, {**shape, "lora_dropout": 0.0}, None)
        adapters.save_weights(peft, "default", artifact)
        head = {"base_model.model.score.weight": new_head(base).weight.detach()}
        save_file(load_file(artifact / adapters.WEIGHTS) | head, artifact / adapters.WEIGHTS, {"format": "pt"})
        base = peft.unload()
        stored.append((artifact, shape))
    return stored


class _Alike(Episodes):
    """Episodes of like lengths."""

    def parts(self, at_once: int) -> list[Tensor]:
        """The first two and the last of those that would be read; between them all are the same."""
        parts = super().parts(at_once)
        return [*parts[:2], *parts[2:][-1:]]


def _episodes(count: int, prompt: int, reply: int) -> Episodes:
    """Prompts with replies of full length, but every second a token shorter."""
    lengths = torch.full((count,), reply) - torch.arange(count) % 2 * (reply > 1)
    return _Alike(
        torch.full((count, prompt + reply), TOKEN),
        torch.full((count,), prompt),
        lengths,
        torch.ones(count, dtype=torch.bool),
        torch.zeros(count, reply),
    )


def _sample(
    policy: PolicyView,
    prompts: Sequence[list[int]],
    reply: int,
    temperature: float,
    ledger: Ledger,
    rollout: Rollout | None = None,
) -> None:
    """The two moments that sampling may need most in: reading the prompts, and the last token of the replies.

    An engine that is not the model itself takes what `result.StageForecast.on` says, beside what is held here.
    """
    if rollout is not None and rollout.is_vllm:
        ledger.note()
        return
    settings: dict[str, Any] = {
        "temperature": temperature, "stop_token_id": None, "pad_token_id": 0, "at_once": len(prompts),
    }  # fmt: skip
    sample(policy, prompts, response_length=min(2, reply), **settings)
    if reply <= 2:
        return
    longest = max(len(prompt) for prompt in prompts) + reply - 1
    whole = [[TOKEN] * (longest - row % 2) for row in range(len(prompts))]
    with policy.generating() as model:
        if "past_key_values" in inspect.signature(model.forward).parameters:  # else its state does not grow
            sample(_Amid(model, ledger), whole, response_length=1, **settings)


class _Amid:
    """A model in the middle of its replies: all but their last token is in its cache already."""

    def __init__(self, model: PreTrainedModel, ledger: Ledger) -> None:
        self.model, self.ledger, self.device, self.forward = model, ledger, model.device, model.forward
        self.prepare_inputs_for_generation = model.prepare_inputs_for_generation

    def _read(self, ids: Tensor, mask: Tensor) -> Any:
        """The cache of all columns but the last."""
        with self.ledger.during(UNCOUNTED), self.ledger.as_part("cache"):
            output = self.model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True, logits_to_keep=1)
        return output.past_key_values

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any, **inputs: Any) -> Any:
        """What `ppo.decoding.decode` asks: the last column."""
        past_key_values = past_key_values or self._read(input_ids, attention_mask)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"][:, -1:]
        last = input_ids[:, -1:]
        return self.model(input_ids=last, attention_mask=attention_mask, past_key_values=past_key_values, **inputs)

    def generate(self, **inputs: Any) -> Any:
        """See `transformers.GenerationMixin.generate`."""
        return self.model.generate(**inputs, past_key_values=self._read(inputs["input_ids"], inputs["attention_mask"]))
