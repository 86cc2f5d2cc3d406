"""Rows come and go while replies are decoded, and every reply is what it would be alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GenerationConfig,
    Lfm2Config,
    MambaConfig,
    Phi3Config,
    PreTrainedConfig,
)

from rlhf_pipeline.ppo import decoding, rollout
from rlhf_pipeline.ppo.decoding import Choice, Replies, decode, generate
from rlhf_pipeline.ppo.rollout import Episodes, sample

PAD, LENGTH, VOCABULARY = 3, 12, 1024
STOP = 7  # of the rows whose lengths a test decides
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "initializer_range": 0.3, "pad_token_id": 0}
LAYERS = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MORE: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(**SMALL, n_layer=2, n_head=4),  # positions from the mask alone
    "lfm2": Lfm2Config(**SMALL, **LAYERS, layer_types=["conv", "full_attention"]),  # a state beside keys and values
    "mamba": MambaConfig(**SMALL, num_hidden_layers=2, state_size=4),  # prepares its inputs in a way of its own
    "phi3": Phi3Config(**SMALL, **LAYERS, bos_token_id=None, eos_token_id=1),  # the same
}  # fmt: skip
BY_GENERATE = {"mamba", "phi3"}
SHAPES = ["llama", "qwen3", "mistral", "gpt2", "opt", "gemma2", *MORE]


@pytest.fixture(scope="module")
def model_of(checkpoints) -> Callable[[str], Any]:
    """A function that loads a small random model of an architecture, once each."""
    made: dict[str, Any] = {}

    def load(shape: str) -> Any:
        if shape not in made and shape in MORE:
            torch.manual_seed(0)
            made[shape] = AutoModelForCausalLM.from_config(MORE[shape]).eval()
        elif shape not in made:
            made[shape] = AutoModelForCausalLM.from_pretrained(checkpoints[shape], dtype=torch.float32).eval()
        return made[shape]

    return load


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Twelve prompts of one to sixteen tokens, of which four are equal."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(8, VOCABULARY, (n,), generator=draw).tolist() for n in (3, 9, 1, 16, 6, 2, 16, 12, 5)]
    return [*rows[:4], rows[1], *rows[4:], rows[1], rows[1]]


@pytest.fixture
def ends(monkeypatch) -> Callable[[list[int]], None]:
    """A function that decides how many tokens each reply has; the stop token comes then, and never before."""

    def decide(lengths: list[int]) -> None:
        class Ending(Choice):
            def __call__(self, logits: Tensor, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
                at_end = places + 1 == torch.tensor(lengths)[rows]
                tokens, log_probs = super().__call__(logits, rows, places)
                tokens = torch.where(at_end, STOP, torch.where(tokens == STOP, STOP + 1, tokens))
                return tokens, torch.where(tokens == STOP, 0.0, log_probs)

        monkeypatch.setattr(rollout, "Choice", Ending)

    return decide


class Passes:
    """What the forward passes of a model were given.

    Attributes:
        rows: of each, how many rows.
        columns: of each, how many columns of the cache its rows see, with their own.
        prompts: of those that began rows, how many of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rows, self.columns, self.prompts = [], [], []
        self.hook = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, _: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        if not inputs.get("use_cache"):
            return  # a whole pass, of `check`
        self.rows.append(len(inputs["input_ids"]))
        self.columns.append(inputs["attention_mask"].shape[1])
        if inputs["attention_mask"].shape == inputs["input_ids"].shape:
            self.prompts.append(len(inputs["input_ids"]))


@pytest.fixture
def passes() -> Any:
    """A function that notes the forward passes of a model, until the test is over."""
    noted: list[Passes] = []

    def watch(model: nn.Module) -> Passes:
        noted.append(Passes(model))
        return noted[-1]

    yield watch
    for one in noted:
        one.hook.remove()


def drawn(model: Any, prompts: list[list[int]], **settings: Any) -> Episodes:
    torch.manual_seed(1)
    default = {"response_length": LENGTH, "temperature": 1.0, "stop_token_id": STOP, "pad_token_id": PAD, "at_once": 64}
    return sample(model, prompts, **default | settings)


@torch.no_grad()
def check(model: Any, episodes: Episodes, prompts: list[list[int]], lengths: list[int]) -> None:
    """Replies have these lengths and stand behind their prompts; log-probabilities are those of each row alone."""
    assert episodes.reply_lengths.tolist() == lengths
    for row, prompt in enumerate(prompts):
        start, end = len(prompt), len(prompt) + lengths[row]
        ids = episodes.ids[row, :end]
        assert ids[:start].tolist() == prompt and (episodes.ids[row, end:] == PAD).all()
        of_row = model(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[start:, None])[:, 0]
        forced = ids[start:] == STOP
        assert_close(episodes.sampled_log_probs[row, : lengths[row]][~forced], of_row[~forced], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_are_those_of_generate_for_each_prompt_alone(model_of, prompts, shape, temperature):
    """All at once, and four at once, so that rows leave and others join; some end by one of several stop tokens."""
    model, prompts = model_of(shape), prompts[:9]
    seeds = range(len(prompts))

    def alone(stops: list[int]) -> list[list[int]]:
        replies = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            own = Replies(1, LENGTH, stops, torch.device("cpu"))
            generate(model, [prompt], own, Choice(temperature, [seed], LENGTH, torch.device("cpu")), PAD, 1)
            replies.append(own.tokens[0, : own.lengths[0]].tolist())
        return replies

    endless = alone([])
    stops = [endless[row][place] for row, place in ((0, 1), (2, 3), (3, 5), (8, 9))]
    expected = alone(stops)
    assert len(set(map(len, expected))) > (1 if temperature == 0 else 3)
    for at_once in (64, 4):
        settings = {"temperature": temperature, "seeds": seeds, "stop_token_id": stops, "at_once": at_once}
        episodes = drawn(model, prompts, **settings)
        assert episodes.tokens == expected
        assert episodes.ended.tolist() == [reply[-1] in stops for reply in expected]


@pytest.mark.parametrize("shape", SHAPES)
def test_which_models_have_a_cache_whose_rows_can_be_left_out(model_of, prompts, shape):
    replies, choose = Replies(1, 1, [], torch.device("cpu")), Choice(0.0, None, 1, torch.device("cpu"))
    assert decode(model_of(shape), prompts[:1], replies, choose, PAD, 1) == (shape not in BY_GENERATE)
    assert replies.lengths[0] == (shape not in BY_GENERATE)


def test_greedy_replies_are_those_that_generate_chooses_itself(model_of, prompts):
    model = model_of("llama")
    settings = GenerationConfig(max_new_tokens=LENGTH, do_sample=False, eos_token_id=[], pad_token_id=PAD)
    rows = [model.generate(torch.tensor([prompt]), generation_config=settings)[0] for prompt in prompts]
    expected = [row[len(prompt) :].tolist() for row, prompt in zip(rows, prompts, strict=True)]
    assert drawn(model, prompts, temperature=0, stop_token_id=None, at_once=5).tokens == expected


@pytest.mark.parametrize("shape", ["llama", "mistral", "opt", "lfm2"])
@pytest.mark.parametrize("at_once", [64, 4])
def test_a_reply_is_not_touched_by_rows_that_leave_and_join(model_of, prompts, ends, shape, at_once):
    model, lengths = model_of(shape), [4, 12, 1, 2, 12, 7, 1, 3, 12, 5, 9, 1]
    ends(lengths)
    check(model, drawn(model, prompts, at_once=at_once), prompts, lengths)


class TestRowsThatAreComputed:
    """Of a Llama; the pass over the prompts gives the first token of each reply."""

    @pytest.mark.parametrize(
        ("lengths", "rows"),
        [
            ([5] * 8, [8] * 5),  # all end at once
            ([1] * 8, [8]),  # all at their first token
            ([2] * 7 + [12], [8, 8] + [1] * 10),  # one goes on to the limit
            ([1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]),
        ],
    )  # fmt: skip
    def test_replies_that_have_ended_are_not(self, model_of, prompts, ends, passes, lengths, rows):
        model, some = model_of("llama"), [*prompts[:4], *prompts[5:9]]
        ends(lengths)
        seen = passes(model)
        episodes = drawn(model, some)
        assert seen.rows == rows
        check(model, episodes, some, lengths)

    def test_a_few_that_have_ended_stay_until_more_have(self, model_of, prompts, ends, passes):
        """Leaving one out of seventeen would not be worth moving the others."""
        model, lengths = model_of("llama"), [2, 4, 4] + [6] * 14
        ends(lengths)
        seen = passes(model)
        drawn(model, [prompts[0] + [number] for number in range(17)])
        assert seen.rows == [17, 17, 17, 17, 14, 14]

    @pytest.mark.parametrize("response_length", [1, 5])
    def test_without_stop_token_all_are_until_the_end(self, model_of, prompts, passes, response_length):
        model, some = model_of("llama"), prompts[5:9]
        seen = passes(model)
        episodes = drawn(model, some, stop_token_id=None, response_length=response_length)
        assert seen.rows == [4] * response_length
        assert not episodes.ended.any()
        check(model, episodes, some, [response_length] * 4)

    def test_prompts_take_the_places_of_replies_that_have_ended(self, model_of, prompts, ends, passes):
        """Never more than `at_once` rows, and fewer passes than batches one after the other would take."""
        model, some = model_of("llama"), [*prompts[:4], *prompts[5:9]]
        # Of the prompts of 3, 9, 1, 16, 6, 2, 16, 12 tokens: of each two that follow each other one is long.
        lengths = [12, 12, 12, 12, 1, 1, 1, 1]
        ends(lengths)
        seen = passes(model)
        check(model, drawn(model, some, at_once=2), some, lengths)
        assert max(seen.rows) == 2
        assert sum(seen.prompts) == 8
        assert len(seen.rows) - len(seen.prompts) < 3 * 11  # and not four times the eleven passes of a long one
        # The columns of a row that has left go with it.
        assert max(seen.columns) <= max(len(prompt) + length for prompt, length in zip(some, lengths, strict=True))

    def test_equal_prompts_are_read_once(self, model_of, prompts, ends, passes):
        """Four replies to each of two prompts, in any order: two rows, and then one for each reply."""
        model, lengths = model_of("llama"), [3] * 8
        some = [prompts[0], prompts[1], prompts[0], prompts[0], prompts[1], prompts[1], prompts[1], prompts[0]]
        ends(lengths)
        seen = passes(model)
        episodes = drawn(model, some)
        assert seen.rows == [2, 8, 8]
        check(model, episodes, some, lengths)
        assert len({tuple(reply) for reply in episodes.tokens}) > 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_not_finite_are_an_error(model_of, prompts, monkeypatch, temperature):
    model = model_of("llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: hidden.new_full((*hidden.shape[:2], 9), torch.nan))
    with pytest.raises(RuntimeError, match="not finite"):
        drawn(model, prompts, temperature=temperature)


def test_choice_leaves_no_token_out_of_a_large_vocabulary():
    """Twenty thousand tokens as likely as each other, of which each tenth is impossible."""
    count, vocabulary, bins = 2_000, 20_000, 20
    torch.manual_seed(2)
    choose, logits = Choice(1.0, None, 1, torch.device("cpu")), torch.zeros(1, vocabulary)
    logits[:, ::10] = -torch.inf
    parts = torch.arange(count).split(250)
    found = [choose(logits.expand(len(rows), -1), rows, torch.zeros_like(rows)) for rows in parts]
    tokens, log_probs = (torch.cat(of) for of in zip(*found, strict=True))
    assert (tokens % 10 != 0).all()
    assert_close(log_probs, torch.full((count,), -torch.tensor(0.9 * vocabulary).log().item()))
    counted, expected = torch.bincount(tokens * bins // vocabulary, minlength=bins).double(), count / bins
    assert ((counted - expected) ** 2 / expected).sum() < bins - 1 + 4 * (2 * (bins - 1)) ** 0.5


class TestParts:
    def episodes(self, lengths: list[int]) -> Episodes:
        sizes = torch.tensor(lengths)
        flat = torch.zeros(len(lengths), max(lengths))
        return Episodes(flat.long(), sizes // 2, sizes - sizes // 2, flat[:, 0] > 0, flat)

    @pytest.mark.parametrize(
        ("lengths", "at_once", "parts"),
        [
            ([5, 9, 2, 9], 64, [[3, 1, 0, 2]]),
            ([5, 9, 2, 9], 1, [[3], [1], [0], [2]]),
            ([2, 9, 2, 2, 2, 2], 1, [[1], [5, 4, 3, 2], [0]]),  # four short ones are no longer than the longest
            ([1500, 600, 700, 2500, 300], 64, [[3], [0], [2, 1], [4]]),
        ],
    )  # fmt: skip
    def test_rows_of_like_length_within_a_number_of_tokens(self, lengths, at_once, parts):
        assert [part.tolist() for part in self.episodes(lengths).parts(at_once)] == parts
        assert rollout.TOKENS_AT_ONCE == 2048


def test_the_share_that_makes_rows_leave() -> None:
    assert decoding.FREE == 1 / 8  # the counts of rows above are for this
