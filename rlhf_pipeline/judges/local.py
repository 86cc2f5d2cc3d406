"""A judge on the shared base: the base itself, or a stage's adapter on it. It reads two tokens' probabilities."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.data.encode import encode_prompts
from rlhf_pipeline.data.turns import Prompt
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.judges.question import Answer, Question, read_template, render
from rlhf_pipeline.models.roles import PolicyView
from rlhf_pipeline.recipe.schema import AIJudge, Data

# Behind a question that is plain text; with a template of one's own, that says how the answer begins.
BEGINNING = "\n\nAnswer:"
SPACES = "Ġ▁ "  # how tokenizers write a space at the beginning of a token
AS_DATA = Data(path="the judge's questions")  # questions are encoded as prompts are


class OnBase(Protocol):
    """Models on one base: `models.staged.StagedBase`, or those of a trainer."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of all of them."""

    def policy(self, stage: str) -> PolicyView:
        """A stage's model, or the `base`."""


class LocalJudge:
    """Asks a model on this machine which of two replies is better.

    As in Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback", section 4.1, nothing is sampled: the
    probability that the first reply is better is p(A) / (p(A) + p(B)) of the token with which the answer begins, each
    letter, or word of `answers`, with and without a space before it. It is not read where p(A) + p(B) is below
    `min_probability`: the model would answer something else.

    A question about a conversation is a user's turn, which goes through the chat template, and the answer begins the
    assistant's turn. About a prompt that is plain text, it is plain text, too, with `BEGINNING` behind it, unless the
    recipe has a `template` of its own, which then ends as it should.

    Args:
        spec: the recipe's.
        staged: the base, with the stage's adapter where `spec.model` is a stage.
        place: the key of the recipe that has the `spec`.

    Raises:
        InputError: the template cannot be used, or the tokenizer has no token for one of the two words.
    """

    def __init__(self, spec: AIJudge, staged: OnBase, place: str) -> None:
        self.spec, self.place = spec, place
        self.template = read_template(spec.template, f"{place}.template")
        self.tokenizer, self.view = staged.tokenizer, staged.policy(spec.model)
        self.tokens = [tokens_of(self.tokenizer, word, f"{place}.answers") for word in spec.answers]

    @torch.no_grad()
    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Its answers; the text of each is the likeliest token.

        A question that is longer than the model can read is not asked, and its answer cannot be read.

        Raises:
            InputError: the template fails on a question.
        """
        ids = encode_prompts(self.tokenizer, AS_DATA, [self._prompt(question) for question in questions])
        limit = getattr(self.view.config.get_text_config(), "max_position_embeddings", None)
        found: list[Answer] = [Answer(None, f"not asked, as it is {len(row):,} tokens long") for row in ids]
        asked = [i for i, row in enumerate(ids) if limit is None or len(row) <= limit]
        asked.sort(key=lambda i: len(ids[i]))  # so that there is little padding
        for start in range(0, len(asked), self.spec.batch_size):
            some = asked[start : start + self.spec.batch_size]
            log_p = self._log_probabilities([ids[i] for i in some])
            of_both = torch.stack([log_p[:, tokens].logsumexp(1) for tokens in self.tokens], 1)
            first = of_both.softmax(1)[:, 0].tolist()
            legible = (of_both.logsumexp(1).exp() >= self.spec.min_probability).tolist()
            words = self.tokenizer.batch_decode(log_p.argmax(1)[:, None])
            for i, p, is_read, word in zip(some, first, legible, words, strict=True):
                found[i] = Answer(p if is_read else None, word)
        return found

    def _prompt(self, question: Question) -> Prompt:
        try:
            text = render(question, self.template)
        except TemplateError as error:
            said = f"the template fails on a question: {error.message}"
            raise InputError(said, place=f"{self.place}.template") from None
        if isinstance(question.prompt, str):
            return text if self.spec.template else text + BEGINNING
        return [{"role": "user", "content": text}]

    def _log_probabilities(self, rows: Sequence[list[int]]) -> Tensor:
        """Of every token at the place behind each row, float32 `[rows, vocabulary]`."""
        longest = max(map(len, rows))
        padded = [row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
        hidden = self.view.hidden_states(torch.tensor(padded, device=self.view.device))
        last = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
        return self.view.head(hidden[torch.arange(len(rows), device=hidden.device), last]).float().log_softmax(1)


def tokens_of(tokenizer: PreTrainedTokenizerBase, word: str, place: str) -> list[int]:
    """The tokens that are a word, with or without a space before it.

    Raises:
        InputError: there is none.
    """
    found = [number for token, number in tokenizer.get_vocab().items() if str(token).lstrip(SPACES) == word]
    if not found:
        raise InputError(f"the tokenizer has no token that is {word!r} alone", place=place)
    return sorted(found)
