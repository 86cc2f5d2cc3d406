"""Talk to a run's models in a terminal: one base in memory, and the stages' adapters switched on it."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import GenerationConfig

from rlhf_pipeline.data.encode import encode_prompts
from rlhf_pipeline.data.turns import typed
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import attention
from rlhf_pipeline.models.reply_end import stop_tokens
from rlhf_pipeline.models.staged import StagedBase, artifacts
from rlhf_pipeline.models.tokenizer import begins_with_space, has_default_template
from rlhf_pipeline.recipe.schema import BASE, Data, Recipe
from rlhf_pipeline.rundir.finished import choose, done, model_of, trained_with, warning
from rlhf_pipeline.rundir.words import printable, show
from rlhf_pipeline.use.score import context_of, first_prompt, score_tokens, scores_of
from rlhf_pipeline.use.stream import stream

HELP = """\
/stage NAME  let another stage's model answer, or the `base` without any; alone: list them
/reward      the reward model's score of the last reply
/reset       forget the conversation
/exit        leave, as Ctrl-D does; Ctrl-C ends a reply early"""


class Chat:
    """A conversation with the models of a run.

    Args:
        run: the run directory.
        recipe: its recipe.
        stage: whose model answers, from `finished.choose`.
        temperature, max_new_tokens: of replies; None is what `evaluate` says, else 0.7 and 256. 0 is greedy.
        system: a system turn to begin with.
        say: takes lines that are no reply.

    Raises:
        InputError: the base cannot be loaded, or prompts have no system turn.
    """

    def __init__(
        self, run: Path, recipe: Recipe, stage: str, temperature: float | None, max_new_tokens: int | None,
        system: str | None, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.run, self.recipe, self.stage, self.say = run, recipe, stage, say
        usual = (recipe.evaluate.temperature, recipe.evaluate.max_new_tokens) if recipe.evaluate else (0.7, 256)
        self.temperature = usual[0] if temperature is None else temperature
        self.max_new_tokens = max_new_tokens or usual[1]
        self.policies, self.rewards = done(run, recipe, "policy"), done(run, recipe, "reward")
        trained = stage if stage != BASE else [*self.policies, *recipe.stages][0]
        self.example, is_chat = first_prompt(run, recipe, trained), recipe.stages[trained].data.chat
        spec, instead = attention.available(model_of(run, recipe, trained))
        if instead:
            say(f"note: {instead}")
        self.base = StagedBase(spec, artifacts(run, [*self.policies, *self.rewards]))
        self.tokenizer = self.base.tokenizer
        self.context = context_of(self.base) or sys.maxsize
        if self.example is not None:
            is_chat = isinstance(self.example, list)
        self.is_chat = is_chat if is_chat is not None else not has_default_template(self.tokenizer)
        if system and not self.is_chat:
            raise InputError("the stage's prompts are plain text, which has no system turn", place="--system")
        self.start = [{"role": "system", "content": system}] if system else []
        self.turns = list(self.start)
        self.last: tuple[list[int], list[int]] | None = None  # the tokens of a prompt and of the reply to it
        self.warned: set[str] = set()
        self.warn(stage)

    def warn(self, stage: str) -> None:
        """Say, once, what to know of a stage before its model is used."""
        about = warning(self.run, stage) if stage not in self.warned else None
        self.warned.add(stage)
        if about:
            self.say(about)

    def greet(self) -> None:
        """Say who answers, and how what is typed becomes a prompt."""
        self.say(f"`{self.stage}` of {self.run} answers; /help lists commands")
        if not self.is_chat:
            self.say("its prompts are plain text: each line is a whole prompt, and \\n in it means a line break")
            if isinstance(self.example, str):
                self.say("the first one of its data: " + printable(self.example.replace("\n", "\\n")))

    def ask(self, text: str) -> bool:
        """Print the reply to what somebody says, while it is sampled; returns whether Ctrl-C ended it early.

        Raises:
            InputError: the chat template refuses the conversation, or it is longer than the model's context.
        """
        content = text.encode("utf-8", "replace").decode()  # of bytes that are no text
        turns, oldest = [*self.turns, {"role": "user", "content": content}], len(self.start)
        ids = self._encode(turns)
        while len(ids) + min(self.max_new_tokens, self.context // 2) > self.context and len(turns) > oldest + 1:
            del turns[oldest : oldest + 2]  # a user's turn and the reply to it
            ids = self._encode(turns)
        if len(turns) <= len(self.turns):
            self.say(f"(the model takes {self.context} tokens: the oldest turns are left out from here on)")
        room = self.context - len(ids)
        if not ids:
            raise InputError("the prompt is empty")
        if room < 1:
            raise InputError(f"the prompt has {len(ids)} tokens, and the model takes {self.context} with the reply")
        sampling = {"temperature": self.temperature, "top_k": 0, "top_p": 1.0} if self.temperature else {}
        settings = GenerationConfig(
            max_new_tokens=min(self.max_new_tokens, room),
            do_sample=bool(sampling),
            eos_token_id=self.stops(),
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )
        tokens, reply, interrupted = stream(self.base.policy(self.stage), self.tokenizer, ids, settings, show)
        show("\n")
        self.last = ids, tokens
        if self.is_chat:
            # The template will write it again.
            said = reply.removeprefix(" ") if begins_with_space(self.tokenizer) else reply
            self.turns = [*turns, {"role": "assistant", "content": said}]
        return interrupted

    def stops(self) -> list[int]:
        """The tokens that end a reply of the stage that answers."""
        checkpoint = self.base.causal_lm.generation_config
        return stop_tokens(self.tokenizer, checkpoint, trained_with(self.run, self.stage))

    def _encode(self, turns: list[dict[str, str]]) -> list[int]:
        try:
            prompt = turns if self.is_chat else typed(turns[-1]["content"], as_turn=False)
            return encode_prompts(self.tokenizer, Data(), [prompt])[0]
        except InputError as error:
            raise InputError(error.message) from None

    def command(self, name: str, argument: str) -> None:
        """Do what a line that begins with `/` says."""
        if name == "/stage":
            if argument:
                self.stage = choose(self.run, self.recipe, "policy", argument)
                self.warn(self.stage)
            others = "" if argument else f"; there are {', '.join([BASE, *self.policies])}"
            self.say(f"`{self.stage}` answers{others}")
        elif name == "/reward":
            self.say(self.reward())
        elif name == "/reset":
            self.turns, self.last = list(self.start), None
        else:
            self.say(HELP if name == "/help" else f"there is no command {printable(name)}; /help lists them")

    def reward(self) -> str:
        """The reward model's score of the last reply, on the very tokens that were sampled, as PPO takes it."""
        if not self.rewards or self.last is None:
            return "there is no reply yet" if self.rewards else "no reward stage of this run is done"
        own = self.recipe.stages[self.stage].parents.get("reward") if self.stage != BASE else None
        name = own if own in self.rewards else self.rewards[-1]
        self.warn(name)
        members = self.base.reward(name)
        (score,) = scores_of(score_tokens(members, [self.last], self.tokenizer.pad_token_id))
        ended = self.last[1][-1] in self.stops()
        said = f"{score.mean:.4f} by `{name}`"
        if len(members) > 1:
            said = f"{score.mean:.4f} ± {score.std:.4f} by `{name}`, whose {len(members)} members differ by that"
        return said + ("" if ended else "; the reply has no end, the score is of what there is")


def converse(chat: Chat) -> bool:
    """Answer line by line until the input ends; returns whether Ctrl-C ended it before."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):  # which some platforms lack
            import readline  # noqa: F401  lines can be edited from here on, and called back
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(f"{chat.stage}> " if at_terminal else "")
            name, _, argument = line.strip().partition(" ")
            if name == "/exit":
                return False
            if name.startswith("/"):
                chat.command(name, argument.strip())
            elif name and chat.ask(line) and not at_terminal:
                return True
        except EOFError:
            return False
        except KeyboardInterrupt:
            if not at_terminal:
                return True
            chat.say("\n(Ctrl-D leaves)")
        except InputError as error:
            chat.say(f"error: {printable(error.message)}" + (f"; {error.hint}" if error.hint else ""))
