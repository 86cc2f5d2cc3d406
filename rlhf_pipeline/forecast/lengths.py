"""How long the texts of a stage are: as its rows are, or else as long as the recipe lets them be. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_pipeline.recipe.library_keys import keys
from rlhf_pipeline.recipe.schema import Data, Recipe, Stage

PROMPT, REPLY = 512, 512  # tokens, where neither rows nor recipe say it
QUESTION = 128  # tokens around what a judge, or a policy that criticises, is asked about
EVALUATE = "evaluate"  # among the names of stages: the prompts on which policies are judged
# Of a stage's rows the longest prompt, and the longest prompt with its reply, where they have one, in tokens.
Known = Mapping[str, tuple[int | None, int | None]]


@dataclass(frozen=True)
class Lengths:
    """In tokens: the longest.

    Attributes:
        prompt: of a prompt.
        whole: of a prompt with its reply.
        assumed: which of both nothing says, in words.
    """

    prompt: int
    whole: int
    assumed: str | None = None

    @property
    def reply(self) -> int:
        """Tokens of a reply."""
        return max(1, self.whole - self.prompt)


def of_stage(stage: Stage, prompt: int | None = None, whole: int | None = None) -> Lengths:
    """The longest texts of a stage.

    Args:
        stage: the stage.
        prompt: the longest of its rows, where it is known; else the recipe's limits count.
        whole: the same of a prompt with its reply.
    """
    data, trainer = stage.data, stage.trainer
    if stage.facts.reply_limit or stage.sampling is not None:  # it reads prompts
        longest, assumed = _prompt(data, prompt)
        if "passes" in stage.facts.takes:  # then replies with their critiques
            longest += 2 * reply_limit(stage) + QUESTION
        return Lengths(longest, longest + reply_limit(stage), assumed)
    if not stage.facts.trains:  # it judges two replies
        longest, assumed = _prompt(data, prompt)
        reply = data.max_completion_length or (whole - longest if whole is not None and whole > longest else REPLY)
        return Lengths(longest, longest + 2 * reply + QUESTION, assumed)
    limit = trainer.get("max_length", keys(stage.kind)["max_length"].default)
    if whole is None and data.max_prompt_length and data.max_completion_length:
        whole = data.max_prompt_length + data.max_completion_length
    assumed = None
    if whole is None and limit is None:
        whole, assumed = PROMPT + REPLY, f"texts of {PROMPT + REPLY:,} tokens"
    longest = min(one for one in (whole, limit) if one is not None)
    if trainer.get("packing"):  # rows are put together up to the limit
        longest = limit or longest
    of_prompt = prompt or data.max_prompt_length
    reply = data.max_completion_length or 0
    of_prompt = of_prompt if of_prompt is not None else longest - reply if reply < longest and reply else longest // 2
    return Lengths(max(1, min(of_prompt, longest - 1)), max(2, longest), assumed)


def of_made_rows(recipe: Recipe, stage: Stage) -> tuple[int | None, int | None]:
    """The same as `Known` of rows that another stage makes, as far as the recipe limits them."""
    makers = [recipe.stages[source.stage] for source in stage.data.sources if source.stage is not None]
    if len(makers) != 1 or len(makers) < len(stage.data.sources):
        return None, None
    prompt, whole = of_made_rows(recipe, makers[0])
    prompt = makers[0].data.max_prompt_length or prompt
    if makers[0].sampling is not None:
        whole = (prompt or PROMPT) + reply_limit(makers[0])
    return prompt, whole


def of_prompts(data: Data, reply: int, prompt: int | None = None) -> Lengths:
    """Of prompts that are answered."""
    longest, assumed = _prompt(data, prompt)
    return Lengths(longest, longest + reply, assumed)


def _prompt(data: Data, prompt: int | None) -> tuple[int, str | None]:
    limit = data.max_prompt_length
    if prompt is None and limit is None:
        return PROMPT, f"prompts of {PROMPT:,} tokens"
    return min(one for one in (prompt, limit) if one is not None), None


def reply_limit(stage: Stage) -> int:
    """The most tokens of a reply that a stage samples."""
    if stage.sampling is not None:
        return stage.sampling.max_new_tokens
    name = stage.facts.reply_limit
    assert name is not None
    return int(stage.trainer.get(name) or keys(stage.kind)[name].default)
