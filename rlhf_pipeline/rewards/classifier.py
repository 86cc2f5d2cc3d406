"""Rewards that are sequence classifiers: models of their own, each with its own tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from rlhf_pipeline.data.turns import Prompt, as_text, as_turns
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import base, experts, loading
from rlhf_pipeline.models.tokenizer import TemplateError, fixed, render_whole
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.rewards.batch import Batch, Text

NOT_FINITE = "it computes numbers that are not finite"
TRIED = "A reply."


class ClassifierError(Exception):
    """A classifier cannot score a reply; the message says why in one sentence."""


class Classifier:
    """A sequence classifier with one label, frozen, quantized as the recipe's base is.

    It reads a conversation as its own chat template writes it; a prompt that is text is then a user's turn. Without a
    chat template it reads the prompt's text and the reply's, with the special tokens that its tokenizer puts around a
    text. A text that is too long for it lacks the beginning of the prompt. The score is the model's own number, the
    logit of its label.

    Args:
        spec: from `recipe.rewards.classifier`.

    Raises:
        InputError: model or tokenizer cannot be loaded, see `load_config`, `loading.load` and `load_tokenizer`; or it
            computes numbers that are not finite.
    """

    def __init__(self, spec: Model) -> None:
        self.spec = spec
        config = load_config(spec)
        self.tokenizer = load_tokenizer(spec, config)
        config.get_text_config().pad_token_id = config.pad_token_id = self.tokenizer.pad_token_id
        with experts.quantized_as_well():
            self.model = loading.load(
                spec,
                config,
                base.device(),
                base.resolve_dtype(spec.dtype),
                AutoModelForSequenceClassification,
                _head(config),
            )
        self.model.requires_grad_(False).eval()
        base.hide_router_logits(self.model)
        self.longest = _longest(self.model, self.tokenizer)
        self._told = False
        if not self._scores([self.tokenizer(TRIED)["input_ids"]]).isfinite().all():
            raise InputError(
                f"{NOT_FINITE}, so some of its weights are not",
                place=spec.place,
                hint="download it again, or set `model.dtype: float32` where 16 bits are too few for it",
            )

    def __call__(self, batch: Batch, at_once: int = 16) -> list[float]:
        """The scores of B replies.

        Args:
            batch: the replies.
            at_once: how many are scored together; that changes nothing but the rounding.

        Raises:
            ClassifierError: it cannot read a text, or its score is not finite.
        """
        texts = []
        for prompt, completion in zip(batch.prompts, batch.completions, strict=True):
            try:
                ids = encoded(self.tokenizer, prompt, completion)
            except TemplateError as error:
                raise ClassifierError(f"`{self.spec.path}` cannot read a reply: {error}") from error
            if len(ids) > self.longest and not self._told:
                said = f"a prompt and reply of {len(ids)} tokens are more than the {self.longest} that it reads"
                print(f"{self.spec.place}: {said}: of this and others, the beginning of the prompt is left out")
                self._told = True
            texts.append(shortened(ids, self.longest, self.tokenizer))
        if found := beyond_embedding(texts, self.tokenizer, self.model.config, self.spec):
            raise ClassifierError(f"`{self.spec.path}` cannot read a reply: {found.message}")
        scores = self._scores(texts, at_once).tolist()
        for row, score in enumerate(scores):
            if not abs(score) < float("inf"):
                begin = as_text(batch.prompts[row])[:60]
                said = f"gave {score} for reply {row + 1}, to the prompt {begin!r}: {NOT_FINITE}"
                raise ClassifierError(f"`{self.spec.path}` {said}")
        return scores

    @torch.no_grad()
    def _scores(self, texts: Sequence[Sequence[int]], at_once: int = 1) -> torch.Tensor:
        """The scores of texts in token ids, float32 `[B]`, on the CPU."""
        scores = torch.empty(len(texts))
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # of like length together: less padding
        for start in range(0, len(order), at_once):
            rows = order[start : start + at_once]
            inputs = self.tokenizer.pad({"input_ids": [list(texts[row]) for row in rows]}, return_tensors="pt")
            inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            with torch.autocast(self.model.device.type, enabled=False):  # whatever the trainer computes in
                scores[rows] = self.model(**inputs).logits[:, 0].float().cpu()
        return scores


def load_config(spec: Model) -> PretrainedConfig:
    """The configuration of a sequence classifier with one label.

    Args:
        spec: from `recipe.rewards.classifier`.

    Raises:
        InputError: see `base.read_config`; or it is none of one.
    """
    config = base.read_config(spec)
    made = [name for name in config.architectures or [] if not name.endswith("ForSequenceClassification")]
    if type(config) not in AutoModelForSequenceClassification._model_mapping or made:
        raise InputError(
            f"a {made[0] if made else f'`{config.model_type}` model'} is no sequence classifier",
            place=spec.place,
            hint="take a reward model whose `architectures`, in config.json, end in ForSequenceClassification",
        )
    if config.num_labels != 1:
        labels = ", ".join(str(label) for label in list(config.id2label.values())[:5])
        raise InputError(
            f"it has {config.num_labels} labels ({labels}), and a reward is one number",
            place=spec.place,
            hint="take a classifier with one label, or have a `function` of yours make one number of them",
        )
    return config


def load_tokenizer(spec: Model, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """A classifier's tokenizer, padding on the right.

    Where it has no pad token, that is the configuration's, or EOS. In its chat template, today is a fixed day, see
    `models.tokenizer`.

    Raises:
        InputError: there is none, or nothing that can serve as padding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            spec.path, revision=spec.revision, trust_remote_code=False, padding_side="right"
        )
    except (OSError, ValueError, KeyError) as error:
        base.refuse_untrusted_code(spec, error)
        raise InputError(
            f"no tokenizer could be loaded: {str(error).splitlines()[0]}",
            place=spec.place,
            hint="a model folder needs its tokenizer files; a hub id needs the network once",
        ) from None
    if tokenizer.pad_token is None:
        pad = config.get_text_config().pad_token_id
        tokenizer.pad_token = tokenizer.eos_token if pad is None else tokenizer.convert_ids_to_tokens(pad)
    if tokenizer.pad_token_id is None:
        raise InputError(
            "its tokenizer has no pad token and no EOS, so texts cannot be scored together",
            place=spec.place,
            hint="set `pad_token` in its tokenizer_config.json",
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: fixed(text, {}) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = fixed(template, {})
    return tokenizer


def check(spec: Model, prompts: Sequence[Prompt]) -> None:
    """See that a classifier can score replies to these prompts; its weights are not read.

    Args:
        spec: from `recipe.rewards.classifier`.
        prompts: some of the data.

    Raises:
        InputError: it cannot, or see `load_config`, `loading.require_weights` and `load_tokenizer`.
    """
    config = load_config(spec)
    loading.require_weights(spec, config, AutoModelForSequenceClassification)
    tokenizer = load_tokenizer(spec, config)
    try:
        texts = [encoded(tokenizer, prompt, TRIED) for prompt in prompts]
    except TemplateError as error:
        raise InputError(
            f"it cannot read a prompt of `data`: {error}",
            place=spec.place,
            hint="take a classifier whose chat template does, or change these rows",
        ) from None
    if found := beyond_embedding(texts, tokenizer, config, spec):
        raise found


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text) -> list[int]:
    """The token ids of a prompt and a reply, as a classifier reads them.

    Raises:
        TemplateError: the chat template refuses the conversation.
    """
    reply = {"role": "assistant", "content": completion} if isinstance(completion, str) else dict(completion[0])
    if tokenizer.chat_template:
        if isinstance(completion, str):  # behind text it may begin with the space between them
            reply["content"] = completion.strip()
        text = render_whole(tokenizer, [*as_turns(prompt), reply])
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    between = "" if isinstance(prompt, str) else "\n\n"
    return list(tokenizer(f"{as_text(prompt)}{between}{reply['content']}")["input_ids"])


def shortened(ids: list[int], longest: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids without the first ones that are too many; a special token that begins them all stays, as BOS or CLS."""
    if len(ids) <= longest:
        return ids
    kept = 1 if ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else 0
    return ids[:kept] + ids[len(ids) - longest + kept :]


def beyond_embedding(
    texts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, spec: Model
) -> InputError | None:
    """What is wrong with texts in token ids; None where the embedding has a row for each token."""
    largest = max((token for ids in texts for token in ids), default=None)
    return base.beyond_embedding(largest, tokenizer, config, spec.place)


def _head(config: PretrainedConfig) -> list[str]:
    """The modules of a classifier that are not its backbone: what makes the score, by name."""
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(config)
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _longest(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model reads at most.

    RoBERTa and its kin count positions from behind the row that is their padding's.
    """
    found = [tokenizer.model_max_length]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        tables: Mapping[str, Any] = dict(model.named_modules())
        begin = [
            module.padding_idx + 1
            for name, module in tables.items()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        ]
        found.append(positions - max(begin, default=0))
    return int(min(found))
