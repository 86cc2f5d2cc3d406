"""One reply, shown while it is sampled, that Ctrl-C ends early."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from rlhf_pipeline.models.roles import PolicyView


def stream(
    policy: PolicyView,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    settings: GenerationConfig,
    write: Callable[[str], object],
) -> tuple[list[int], str, bool]:
    """Sample a reply.

    Args:
        policy: whose it is.
        tokenizer: the policy's.
        prompt: token ids.
        settings: how to sample.
        write: takes the reply's text as it grows, each part once.

    Returns:
        The reply's token ids, with what ends it where the model wrote that; its text; and whether Ctrl-C ended it.
    """
    reply = _Reply(tokenizer, write)
    ids = torch.tensor([prompt], device=policy.device)
    with _noticing_ctrl_c() as interrupted:
        policy.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=reply,
            stopping_criteria=StoppingCriteriaList([_When(interrupted)]),
        )
    return reply.ids, reply.text, interrupted.is_set()


class _Reply:
    """What `generate` takes as a streamer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.text = ""
        self._prompted = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then each token."""
        if self._prompted:
            self.ids += value.flatten().tolist()
            self._show(self._decoded().rstrip("\ufffd"))  # half of a character becomes whole with the next token
        self._prompted = True

    def end(self) -> None:
        """See that all of it is shown."""
        self._show(self._decoded())

    def _decoded(self) -> str:
        # As a whole each time: some tokenizers drop the space of a token that is the first.
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def _show(self, text: str) -> None:
        self.write(text[len(self.text) :])
        self.text = text


class _When(StoppingCriteria):
    """Ends sampling when an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@contextlib.contextmanager
def _noticing_ctrl_c() -> Iterator[threading.Event]:
    """Have Ctrl-C set an event, and a second one interrupt as ever."""
    event = threading.Event()

    def notice(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, notice)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
