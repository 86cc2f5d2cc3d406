"""Replies are the policy's own, drawn from its whole distribution, and lie in their rows where the lengths say."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.ppo.rollout import Episodes, concatenate, diversity, sample

LENGTH = 12
PAD = 3  # not the token that the checkpoint calls padding, nor EOS


@pytest.fixture(scope="module")
def shared(make_artifacts, share) -> SharedBase:
    """Four roles on a base that by itself ends no text, as TRL's trainer leaves it."""
    shared = share(make_artifacts())
    shared.causal_lm.generation_config.eos_token_id = None
    return shared


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Twenty-four prompts of one to eight tokens; two hold the padding token, at the start and at the end."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 1024, (1 + i % 8,), generator=draw).tolist() for i in range(24)]
    rows[3][0] = rows[5][-1] = PAD
    return rows


@pytest.fixture(scope="module")
def draw(shared, prompts) -> Callable[..., Episodes]:
    """A function that samples with the same random numbers every time, by default with a seed for each prompt."""

    def sampled(**settings: Any) -> Episodes:
        torch.manual_seed(1)
        default = {"response_length": LENGTH, "temperature": 1.0, "stop_token_id": None, "pad_token_id": PAD}
        some = settings.pop("prompts", prompts)
        default |= {"at_once": 64, "seeds": range(len(some))}
        return sample(shared.policy, some, **default | settings)

    return sampled


@pytest.fixture(scope="module")
def endless(draw) -> list[list[int]]:
    """The replies when nothing stops them: what is said before a stop token does not depend on which it is."""
    return replies_in(draw(stop_token_id=None))


@pytest.fixture(scope="module")
def stop(endless) -> int:
    """A token that is the first of one reply, comes in the middle of another and not at all in a third."""
    return next(
        token
        for token in (reply[0] for reply in endless)
        if any(0 < reply.index(token) < LENGTH - 1 for reply in endless if token in reply)
        and any(token not in reply for reply in endless)
    )


def replies_in(episodes: Episodes) -> list[list[int]]:
    """Each reply as its lengths say where it is."""
    starts, lengths = episodes.prompt_lengths.tolist(), episodes.reply_lengths.tolist()
    return [episodes.ids[i, start : start + lengths[i]].tolist() for i, start in enumerate(starts)]


def cut(replies: list[list[int]], stop: int) -> list[list[int]]:
    """Replies as far as their first stop token, with it."""
    return [reply[: reply.index(stop) + 1] if stop in reply else reply for reply in replies]


def check(episodes: Episodes, prompts: list[list[int]], stop: int | None, pad: int) -> None:
    """Hold every field against what ids and lengths must be for these prompts."""
    replies = replies_in(episodes)
    width, longest = max(len(p + r) for p, r in zip(prompts, replies, strict=True)), max(map(len, replies))
    assert episodes.ids.shape == (len(prompts), width)
    assert episodes.mask.shape == episodes.replies.shape == episodes.sampled_log_probs.shape == (len(prompts), longest)
    assert len(episodes) == len(prompts)
    assert (episodes.mask.dtype, episodes.ended.dtype) == (torch.bool, torch.bool)
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        whole = prompt + reply
        assert episodes.ids[i].tolist() == whole + [pad] * (width - len(whole))
        assert episodes.mask[i].tolist() == [True] * len(reply) + [False] * (longest - len(reply))
        assert episodes.replies[i, : len(reply)].tolist() == reply
        assert bool(episodes.ended[i]) == (reply[-1] == stop)
        assert stop not in reply[:-1]


@torch.no_grad()
def log_probs_alone(shared: SharedBase, episodes: Episodes, temperature: float) -> Tensor:
    """Of each reply token, from one pass over its row without padding and cache; 0 elsewhere."""
    result = torch.zeros(episodes.mask.shape)
    for i, (start, count) in enumerate(zip(episodes.prompt_lengths, episodes.reply_lengths, strict=True)):
        ids = episodes.ids[i, : start + count]
        log_p = (shared.policy(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
        result[i, :count] = log_p[start - 1 : -1].gather(1, ids[start:, None])[:, 0]
    return result


class TestSample:
    def test_replies_end_with_their_first_stop_token(self, draw, prompts, endless, stop):
        """At the first token, in the middle or never; what comes before the stop token is what would have come."""
        episodes = draw(stop_token_id=stop)
        check(episodes, prompts, stop, PAD)
        assert replies_in(episodes) == cut(endless, stop)
        lengths = episodes.reply_lengths[episodes.ended]
        assert lengths.min() == 1
        assert 1 < lengths.max() < LENGTH
        assert not episodes.ended.all()
        assert set(episodes.reply_lengths[~episodes.ended].tolist()) == {LENGTH}

    def test_without_stop_token_every_reply_has_full_length(self, shared, draw, prompts, endless, stop, monkeypatch):
        """Also where the model itself knows a token that ends texts."""
        monkeypatch.setattr(shared.causal_lm.generation_config, "eos_token_id", stop)
        episodes = draw(stop_token_id=None)
        check(episodes, prompts, None, PAD)
        assert replies_in(episodes) == endless
        assert set(episodes.reply_lengths.tolist()) == {LENGTH}
        assert not episodes.ended.any()

    def test_padding_may_be_the_stop_token(self, draw, prompts, endless, stop):
        """A reply has one stop token; those behind it are padding."""
        episodes = draw(stop_token_id=stop, pad_token_id=stop)
        check(episodes, prompts, stop, stop)
        assert replies_in(episodes) == cut(endless, stop)

    def test_sampled_padding_token_belongs_to_the_reply(self, draw, prompts, endless, stop):
        """The token that fills rows up may be sampled, in the middle of a reply and at its end."""
        replies = cut(endless, stop)
        inside = next(reply[2] for reply in replies if len(reply) == LENGTH)
        last = next(reply[-1] for reply in replies if len(reply) == LENGTH and reply[-1] not in reply[:-1])
        for pad in (inside, last):
            episodes = draw(stop_token_id=stop, pad_token_id=pad)
            check(episodes, prompts, stop, pad)
            assert replies_in(episodes) == replies
            assert any(pad in reply for reply in replies_in(episodes))

    def test_all_stop_at_once(self, draw, prompts, endless):
        """Columns that no reply needs are not kept: generation may end before `response_length`."""
        episodes = draw(prompts=prompts[:1], stop_token_id=endless[0][0])
        assert episodes.reply_lengths.item() <= LENGTH
        check(episodes, prompts[:1], endless[0][0], PAD)

    @pytest.mark.parametrize("at_once", [1, 5, 11])
    def test_batch_in_parts(self, shared, draw, prompts, at_once):
        """Parts with prompts and replies of other lengths fit together, in the order of the prompts."""
        some = prompts[:12]
        settings = {"prompts": some, "temperature": 0.3, "at_once": at_once}  # cold, so that one token comes often
        ((stop, _),) = Counter(itertools.chain(*replies_in(draw(**settings)))).most_common(1)
        episodes = draw(**settings, stop_token_id=stop)
        check(episodes, some, stop, PAD)
        assert len(set(episodes.reply_lengths.tolist())) > 3
        expected = log_probs_alone(shared, episodes, 0.3)
        assert_close(episodes.sampled_log_probs * episodes.mask, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
    def test_log_probs_are_those_of_a_forward_pass(self, shared, draw, stop, temperature):
        """What generation notes from its cache is the log-probability of the token that was sampled, at its place."""
        episodes = draw(stop_token_id=stop, temperature=temperature)
        expected = log_probs_alone(shared, episodes, temperature)
        assert_close(episodes.sampled_log_probs * episodes.mask, expected, rtol=1e-4, atol=1e-4)
        assert episodes.sampled_log_probs.dtype == torch.float32
        assert not episodes.sampled_log_probs.requires_grad

    def test_same_random_numbers_give_the_same_replies(self, draw, stop):
        """Without seeds, sampling depends on torch's generator and on nothing else."""
        settings = {"stop_token_id": stop, "seeds": None, "at_once": 5}
        one, other = draw(**settings), draw(**settings)
        assert not torch.equal(one.ids, draw(**settings | {"at_once": 6}).ids)
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.sampled_log_probs, other.sampled_log_probs)


class TestSeeds:
    def test_a_reply_is_its_own_seeds_whatever_is_beside_it(self, draw, prompts):
        """One at a time, five, all at once, and in another order: the same replies, as another seed's are not."""
        settings = {"seeds": [-(2**63), 2**63 - 1, *range(2, len(prompts))], "temperature": 0.5}
        ((stop, _),) = Counter(itertools.chain(*replies_in(draw(**settings)))).most_common(1)
        settings["stop_token_id"] = stop
        expected = replies_in(draw(**settings))
        assert len(set(map(len, expected))) > 3
        for at_once in (1, 5):
            assert replies_in(draw(**settings, at_once=at_once)) == expected
        assert replies_in(draw(**settings | {"prompts": prompts[:3], "seeds": settings["seeds"][:3]})) == expected[:3]
        backwards = {"prompts": prompts[::-1], "seeds": settings["seeds"][::-1], "at_once": 7}
        assert replies_in(draw(**settings | backwards))[::-1] == expected
        others = replies_in(draw(**settings | {"seeds": range(100, 100 + len(prompts))}))
        assert sum(one == other for one, other in zip(others, expected, strict=True)) < 4

    def test_other_random_numbers_are_left_alone(self, draw, prompts, stop):
        """Torch's own generator is neither asked nor moved."""
        one = replies_in(draw(seeds=range(len(prompts))))
        before = torch.get_rng_state()
        torch.manual_seed(5)
        assert replies_in(draw(seeds=range(len(prompts)))) == one
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), before)

    def test_fields_and_log_probs_are_as_of_any_sampling(self, shared, draw, prompts, stop):
        episodes = draw(stop_token_id=stop, temperature=0.7, seeds=range(len(prompts)), at_once=5)
        check(episodes, prompts, stop, PAD)
        expected = log_probs_alone(shared, episodes, 0.7)
        assert_close(episodes.sampled_log_probs * episodes.mask, expected, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_each_token_has_a_number_of_its_own(self, shared, draw):
        """Where in its distribution a token lies says nothing of where the next one lies in its own."""
        count, prompt = 400, [17, 200, 33]
        ids = draw(prompts=[prompt] * count, response_length=2, seeds=range(count), at_once=count).ids
        logits = shared.policy(input_ids=ids).logits[:, len(prompt) - 1 : -1]
        sums, tokens = logits.double().softmax(-1).cumsum(-1), ids[:, len(prompt) :, None]
        places = (sums.gather(2, tokens) - logits.double().softmax(-1).gather(2, tokens) / 2)[..., 0]
        assert abs(torch.corrcoef(places.T)[0, 1]) < 4 / count**0.5

    def test_greedy_has_no_use_for_them(self, draw, prompts):
        assert replies_in(draw(temperature=0.0, seeds=range(len(prompts)))) == replies_in(draw(temperature=0.0))


class TestDistribution:
    DRAWS = 4000

    @pytest.mark.parametrize("seeds", [None, range(4000)])
    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_tokens_come_as_often_as_the_model_says(self, shared, draw, temperature, seeds):
        """No token is favoured and none is left out: Pearson's chi-squared over the likely ones and all the others."""
        prompt = [17, 200, 33]
        settings = {"response_length": 1, "temperature": temperature, "at_once": self.DRAWS, "seeds": seeds}
        episodes = draw(prompts=[prompt] * self.DRAWS, **settings)
        with torch.no_grad():
            p = (shared.policy(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).double()
        observed = torch.bincount(episodes.replies[:, 0], minlength=len(p)).double()
        likely = p * self.DRAWS >= 10  # fewer are not normally distributed
        assert likely.sum() > 20
        assert p[~likely].sum() > 0.05
        expected = torch.cat([p[likely], p[~likely].sum()[None]]) * self.DRAWS
        counted = torch.cat([observed[likely], observed[~likely].sum()[None]])
        degrees = len(expected) - 1
        # Over four of its standard deviations above its mean it comes by chance less than once in a thousand times.
        assert ((counted - expected) ** 2 / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5

    def test_policy_samples_under_its_own_adapter(self, make_artifacts, share, draw, prompts):
        """Another policy gives other replies from the same random numbers, whichever role is active outside."""
        shared = share(make_artifacts())

        def replies() -> list[list[int]]:
            torch.manual_seed(1)
            settings = {"response_length": 4, "temperature": 1.0, "stop_token_id": None, "pad_token_id": PAD}
            return replies_in(sample(shared.policy, prompts, **settings, at_once=64))

        before = replies()
        with shared.acting_as("value"):
            assert replies() == before
        with torch.no_grad():
            for parameter in shared.policy.parameters():
                parameter.add_(0.3)
        assert replies() != before


def by_hand() -> Episodes:
    """Three episodes: prompt 10, 11 and reply 20; prompt 12 and reply 21, 22, 23; prompt 13, 14 and reply 24, 25."""
    return Episodes(
        ids=torch.tensor([[10, 11, 20, 0], [12, 21, 22, 23], [13, 14, 24, 25]]),
        prompt_lengths=torch.tensor([2, 1, 2]),
        reply_lengths=torch.tensor([1, 3, 2]),
        ended=torch.tensor([True, False, True]),
        sampled_log_probs=torch.tensor([[-1.0, 0, 0], [-2, -3, -4], [-5, -6, 0]]),
    )


def listed(episodes: Episodes) -> dict[str, list]:
    names = ("ids", "prompt_lengths", "reply_lengths", "ended", "sampled_log_probs", "mask")
    return {name: getattr(episodes, name).tolist() for name in names}


class TestSelect:
    def test_rows_by_number_in_any_order(self):
        """Rows come as asked for, with all that belongs to them."""
        assert listed(by_hand().select(torch.tensor([2, 0]))) == {
            "ids": [[13, 14, 24, 25], [10, 11, 20, 0]],
            "prompt_lengths": [2, 2],
            "reply_lengths": [2, 1],
            "ended": [True, True],
            "sampled_log_probs": [[-5, -6], [-1, 0]],
            "mask": [[True, True], [True, False]],
        }

    def test_columns_that_no_row_needs_are_left_out(self):
        """A short episode alone has no padding, neither behind its row nor behind its reply."""
        episodes = by_hand()
        assert episodes.mask.shape == (3, 3)  # looked at before: what is remembered of all must not stay with one
        one = episodes.select(slice(0, 1))
        assert listed(one) == {
            "ids": [[10, 11, 20]],
            "prompt_lengths": [2],
            "reply_lengths": [1],
            "ended": [True],
            "sampled_log_probs": [[-1]],
            "mask": [[True]],
        }
        assert one.replies.tolist() == [[20]]

    def test_parts_are_the_whole(self):
        """Whatever is taken apart by rows and put together again is what it was."""
        episodes = by_hand()
        parts = [episodes.select(rows) for rows in (slice(0, 1), slice(1, 3))]
        assert parts[0].ids.shape != parts[1].ids.shape
        assert listed(concatenate(parts, 0)) == listed(episodes)


class TestConcatenate:
    def test_shorter_parts_are_filled_up(self):
        """Ids with the padding token, log-probabilities with 0; replies stay where they were."""
        short = by_hand().select(slice(0, 1))
        for parts in ([short, by_hand()], [by_hand(), short]):
            whole = concatenate(parts, 9)
            row = 0 if parts[0] is short else 3
            assert len(whole) == 4
            assert whole.ids[row].tolist() == [10, 11, 20, 9]
            assert whole.sampled_log_probs[row].tolist() == [-1, 0, 0]
            assert whole.mask[row].tolist() == [True, False, False]
            assert whole.ended[row]
            others = listed(whole.select(torch.tensor([i for i in range(4) if i != row])))
            assert others == listed(by_hand())

    def test_one_part_stays_as_it_is(self):
        """A batch that was sampled at once is not changed."""
        assert listed(concatenate([by_hand()], 9)) == listed(by_hand())


def test_diversity_counts_pairs_and_replies_and_no_padding() -> None:
    """Replies `5 6 5 6`, `5 6` twice, once at the end of its row, and `9`: pairs 56 65 56, 56, 56, none."""
    rows = [([7, 8], [5, 6, 5, 6]), ([7, 8], [5, 6]), ([7, 8, 9, 9], [5, 6]), ([7, 8], [9])]
    ids = torch.tensor([[*prompt, *reply] + [PAD] * (6 - len(prompt) - len(reply)) for prompt, reply in rows])
    prompt_lengths, lengths = (torch.tensor([len(row[i]) for row in rows]) for i in (0, 1))
    episodes = Episodes(ids, prompt_lengths, lengths, torch.ones(4, dtype=torch.bool), torch.zeros(4, 4))
    assert diversity(episodes) == (2 / 5, 3 / 4)
    assert diversity(episodes.select(torch.tensor([3]))) == (0.0, 1.0)


def test_greedy_replies_hold_the_likeliest_tokens(shared, draw) -> None:
    episodes = draw(temperature=0.0, prompts=[[7, 8, 9], [11]])
    reply = draw(temperature=0.0, prompts=[[7, 8, 9], [11]])
    assert_close(episodes.ids, reply.ids)
    for row, prompt in enumerate(([7, 8, 9], [11])):
        ids = list(prompt)
        for place in range(LENGTH):
            logits = shared.policy(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
            noted = episodes.sampled_log_probs[row, place]
            assert_close(noted, logits.log_softmax(0)[ids[-1]], rtol=1e-4, atol=1e-4)
        assert episodes.ids[row, : len(ids)].tolist() == ids
