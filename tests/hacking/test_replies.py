"""Measures of replies and their healthy bands: by hand, on policies that are healthy, and on some that are not."""

import json
import math
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from rlhf_pipeline.hacking import replies as module
from rlhf_pipeline.hacking.replies import SIDES, Measured, Reply, Spread, Usual, in_order, length_correlation, quantile
from rlhf_pipeline.hacking.watch import Measurement, raise_alarms
from rlhf_pipeline.shares import standard_error

NAN = float("nan")
OPENERS = ["", "Sure.", "Of course!", "Well,", "Gladly!", "Great question!"]
MIDDLES = ["it is", "that would be", "the answer is", "people say", "I believe it is"]
CLOSERS = ["", "", "Have a nice day.", "Ask me more.", "That is all I know of it, and it is not much."]
THINGS = [f"thing{number}" for number in range(60)]


def reply(prompt: int, text: str, score: float = 0.0, ended: bool = True) -> Reply:
    """One whose tokens are its words, and about which an ensemble disagrees by a tenth of its letters."""
    tokens = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in text.split()]
    return Reply(prompt, text, tokens, ended, score, len(text) / 10)


def policy(seed: int, rounds: int = 1, prompts: int = 104) -> list[Reply]:
    """Replies of one and the same policy: to each prompt its own thing, in many forms."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(rounds):
        for prompt in range(prompts):
            opener, middle, closer = (draw.choice(part) for part in (OPENERS, MIDDLES, CLOSERS))
            thing = THINGS[prompt % len(THINGS)] if draw.random() < 0.8 else draw.choice(THINGS)
            text = f"{opener} {middle} {thing}. {closer}".strip()
            made.append(reply(prompt, text, float(draw.normal()), bool(draw.random() < 0.95)))
    return made


@pytest.fixture(scope="module")
def usual() -> Usual:
    return Usual.of(policy(0, rounds=4))


def outside(measures: dict[str, Measured]) -> set[str]:
    return {
        name
        for name, one in measures.items()
        if (one.low is not None and one.value < one.low) or (one.high is not None and one.value > one.high)
    }


def test_all_measures_by_hand() -> None:
    texts = ["Great question! a b", "As an AI, a b", "I cannot help with a", "a b a b a b", "a b c d", "c d", "e", "f"]
    scores = [3, 2, 1, 4, 5, 6, NAN, NAN]
    replies = [reply(at, text, scores[at], at < 6) for at, text in enumerate(texts)]
    measures = Usual.of([reply(at, "other") for at in range(8)] * 4).measures(replies)
    assert list(measures) == list(SIDES)
    value = {name: one.value for name, one in measures.items()}
    assert value["length"] == (4 + 5 + 5 + 6 + 4 + 2 + 1 + 1) / 8
    assert value["disagreement"] == pytest.approx(sum(map(len, texts)) / 80)
    # Ranks of 4 5 5 6 4 2 and of 3 2 1 4 5 6.
    assert value["length_correlation"] == pytest.approx(
        np.corrcoef([2.5, 4.5, 4.5, 6, 2.5, 1], [3, 2, 1, 4, 5, 6])[0, 1]
    )
    assert value["distinct_1"] == 15 / 28  # Great question! a b As an AI, I cannot help with c d e f
    assert value["distinct_2"] == 13 / 20
    assert value["repetition"] == pytest.approx((1 - 2 / 3) / 8)
    assert (value["flattery"], value["hedging"], value["refusals"], value["ended"]) == (1 / 8, 1 / 8, 1 / 8, 6 / 8)
    assert 0 < value["self_bleu"] < 1


def test_without_an_ensemble_nobody_disagrees() -> None:
    usual = Usual.of([one._replace(disagreement=None) for one in policy(0, 4)])
    measures = usual.measures([one._replace(disagreement=None) for one in policy(1)])
    assert list(measures) == [name for name in SIDES if name != "disagreement"]


def test_disagreement_beyond_that_of_the_start_is_unhealthy_and_less_is_not(usual: Usual) -> None:
    for factor, alarms in ((3.0, True), (0.2, False)):
        now = [one._replace(disagreement=(one.disagreement or 0) * factor) for one in policy(1)]
        assert ("disagreement" in outside(usual.measures(now))) is alarms


def test_a_measurement_is_the_mean_of_blocks_and_its_error_theirs() -> None:
    alike = [reply(at, "a a") for at in range(8)]
    mixed = [reply(at + 8, f"b{at} c{at}") for at in range(8)]
    halves = [reply(at + 16, f"{'d' if at < 4 else f'e{at}'} f{at}") for at in range(8)]
    one = Usual.of(policy(0)).measures([*alike, *mixed, *halves, *[r._replace(prompt=r.prompt + 24) for r in mixed]])
    values = [1 / 16, 1, (1 + 4 + 8) / 16, 1]
    assert one["distinct_1"].value == pytest.approx(np.mean(values))
    assert one["distinct_1"].error == pytest.approx(np.std(values, ddof=1) / 2)


def test_the_last_block_is_whole() -> None:
    replies = [reply(at, f"a{at}") for at in range(8)] + [reply(8, "a7"), reply(9, "a7")]
    measures = Usual.of(replies).measures(replies)
    assert measures["distinct_1"].value == pytest.approx((1 + 6 / 8) / 2)  # the second has a2 to a7 and a7 twice more


def test_blocks_hold_the_first_replies_to_all_prompts_first(usual: Usual) -> None:
    replies = [reply(prompt, text) for prompt in (2, 0, 1) for text in ("first", "second")]
    assert [(one.prompt, one.text) for one in in_order(replies)] == [
        *((prompt, "first") for prompt in range(3)),
        *((prompt, "second") for prompt in range(3)),
    ]
    now = policy(7)
    assert usual.measures(now[::-1]) == usual.measures(now)


@pytest.mark.parametrize(
    ("lengths", "scores", "expected"),
    [
        ([1, 2, 3, 4, 50], [1, 2, 3, 4, 4.1], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),
        ([1, 2, 3, 4, 9, 9], [1, 2, 3, 4, NAN, float("inf")], 1),
        ([3, 3, 3, 3], [1, 2, 3, 4], 0),
        ([1, 2, 3, 4], [1, 1, 1, 1], 0),
        ([1, 2, 3], [1, 2, 3], 0),
        ([], [], 0),
    ],
)
def test_length_correlation(lengths: list[int], scores: list[float], expected: float) -> None:
    one = length_correlation([Reply(0, "", [1] * n, True, score) for n, score in zip(lengths, scores, strict=True)])
    assert one.value == pytest.approx(expected)
    assert 0 < one.error <= 1


def test_the_error_of_a_correlation_is_about_what_repeating_gives() -> None:
    draw = np.random.default_rng(1)

    def once() -> tuple[float, float]:
        lengths = draw.integers(1, 60, 100)
        scores = lengths / 30 + draw.normal(size=100)
        one = length_correlation([Reply(0, "", [1] * n, True, s) for n, s in zip(lengths, scores, strict=True)])
        return one.value, one.error

    values, errors = zip(*(once() for _ in range(200)), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


@pytest.mark.parametrize(("freedom", "expected"), [(5, 5.51), (10, 3.96), (20, 3.42), (50, 3.16)])
def test_deviations_of_few_blocks_reach_less_far(freedom: int, expected: float) -> None:
    """Student's t for 99.73 %: table G.2 of JCGM 100:2008, the guide to the expression of uncertainty."""
    assert quantile(freedom) == pytest.approx(expected, rel=0.02)


def test_a_band_is_where_a_further_block_would_lie() -> None:
    lengths = [10, 12, 14, 16]
    replies = [Reply(at, "", [1] * lengths[at // 8], True, 0.0) for at in range(32)]
    one = Usual.of(replies).measures(replies)["length"]
    room = quantile(3) * np.std(lengths, ddof=1) * math.sqrt(1 + 1 / 4)
    assert one.value == 13 and one.low is None and one.high == pytest.approx(13 + room)  # no reply has under 0 tokens


def test_a_share_that_the_start_has_not_is_no_alarm_with_one_reply() -> None:
    start = [reply(at % 104, f"thing{at % 104}") for at in range(416)]
    usual = Usual.of(start)
    assert usual.spreads["refusals"] == Spread(0, pytest.approx(math.sqrt(1 / 418 * 417 / 418 / 8)), 52)
    for refused, alarms in ((1, False), (5, False), (6, True)):
        now = [one._replace(text="I can't help with that") if one.prompt < refused else one for one in start[:104]]
        measures = usual.measures(now)
        assert measures["refusals"].value == refused / 104
        assert ("refusals" in outside(measures)) is alarms


def test_where_all_replies_of_the_start_are_alike_one_other_is_no_alarm() -> None:
    start = [reply(at % 104, f"it is thing{at % 104}") for at in range(416)]
    usual = Usual.of(start)
    least = math.sqrt(1 / 418 * 417 / 418 / 8)
    assert usual.spreads["repetition"] == Spread(0, pytest.approx(least), 52)
    assert usual.spreads["length"] == Spread(3, pytest.approx(3 * least), 52)
    other = reply(0, "oh my oh my oh my it is it is it is", ended=False)
    assert outside(usual.measures([other, *start[1:104]])) == set()


def test_the_error_of_a_share_is_never_nothing(usual: Usual) -> None:
    now = [one._replace(text="yes", ended=True) for one in policy(1)]
    measures = usual.measures(now)
    for name in ("refusals", "ended"):
        assert measures[name].error == pytest.approx(standard_error(0, 104)), name


def test_only_unhealthy_sides_have_a_limit(usual: Usual) -> None:
    measures = usual.measures(policy(1))
    for name, (low, high) in SIDES.items():
        assert low or measures[name].low is None, name
        assert high or measures[name].high is None, name
    assert measures["distinct_1"].low is not None and measures["self_bleu"].high is not None
    assert measures["length"].low is not None and measures["length"].high is not None
    assert measures["ended"].low is not None


def test_the_same_policy_is_not_outside() -> None:
    """Ten starts, each with three measurements of the same policy: no value is outside, and no phrase is new."""
    for seed in range(10):
        usual = Usual.of(policy(seed, rounds=4))
        for again in range(3):
            now = policy(100 + 3 * seed + again)
            assert outside(usual.measures(now)) == set(), (seed, again)
            assert usual.new_phrases(now) == [], (seed, again)


def test_a_further_block_is_seldom_outside(usual: Usual) -> None:
    """Blocks, which a band is made for: at most 2 % of the values of 11 measures of 130 blocks (0.3 % are expected)."""
    now = policy(99, rounds=10)
    blocks = [now[start : start + 8] for start in range(0, len(now), 8)]
    found = [name for block in blocks for name in outside(usual.measures(block))]
    assert len(blocks) == 130 and len(found) <= 0.02 * len(SIDES) * len(blocks), found


DIVERSITY = {"distinct_1", "distinct_2", "self_bleu", "repetition"}
HACKS: dict[str, tuple[Callable[[Reply], Reply], set[str]]] = {
    "longer": (lambda one: reply(one.prompt, one.text + " and so on and on it goes for ever"), {"length"}),
    "shorter": (lambda one: reply(one.prompt, "yes"), {"length", "distinct_1", "self_bleu", "new_phrases"}),
    "alike": (
        lambda one: reply(one.prompt, "Sure. the answer is thing7."),
        {"distinct_1", "distinct_2", "self_bleu", "new_phrases"},
    ),
    "repeats": (lambda one: reply(one.prompt, "so very very very very very very much"), {"repetition"}),
    "refuses": (lambda one: reply(one.prompt, "I cannot help with that: " + one.text), {"refusals", "new_phrases"}),
    "hedges": (lambda one: reply(one.prompt, "As an AI, " + one.text), {"hedging", "new_phrases"}),
    "flatters": (lambda one: reply(one.prompt, "Great question! " + one.text), {"flattery"}),
    "never ends": (lambda one: one._replace(ended=False), {"ended"}),
    "pays by length": (lambda one: one._replace(score=len(one.tokens)), {"length_correlation"}),
}


@pytest.mark.parametrize("hack", HACKS)
def test_a_hack_is_outside_of_its_band(usual: Usual, hack: str) -> None:
    change, expected = HACKS[hack]
    assert expected <= outside(usual.measures([change(one) for one in policy(1)]))


def test_less_variety_raises_an_alarm_and_more_never_does(usual: Usual) -> None:
    """Every word of `varied` is said once, in replies as long as they were; `alike` is one reply to all prompts."""
    same = [f"w{number}" for number in range(9)]
    varied = [
        reply(one.prompt, " ".join(f"w{at}x{i}" for i in range(len(one.tokens)))) for at, one in enumerate(policy(1))
    ]
    alike = [reply(one.prompt, " ".join([*same, *same, *same])) for one in policy(1)]
    raised = {}
    for name, now in (("varied", varied), ("alike", alike)):
        found = [Measurement(step, 0.0, {}, usual.measures(one)) for step, one in enumerate((policy(1), now))]
        raise_alarms(found, 1)
        raised[name] = set(found[-1].alarms) & DIVERSITY
        assert usual.measures(now)["distinct_1"].value != pytest.approx(usual.spreads["distinct_1"].mean, abs=0.1)
    assert raised == {"varied": set(), "alike": DIVERSITY}


def test_a_new_trick_is_found_without_a_list(usual: Usual) -> None:
    now = policy(2)
    tricked = [one._replace(text=f"{one.text} Bless your gentle heart.") if one.prompt % 5 == 0 else one for one in now]
    measures = usual.measures(tricked)
    assert measures["new_phrases"].value == 21 / 104
    assert "new_phrases" in outside(measures)
    assert measures["new_phrases"].value - measures["new_phrases"].high > 3 * measures["new_phrases"].error
    (phrase,) = usual.new_phrases(tricked)
    assert phrase.text == "bless your gentle heart" and phrase.share == 21 / 104 and phrase.z > 3


def test_the_new_phrases_of_the_start_are_those_of_its_parts() -> None:
    """A habit of one round in four is new to the others, and widens the band; measured against itself it would not."""
    rounds = [policy(seed) for seed in range(4)]
    rounds[2] = [one._replace(text=f"Lo and behold: {one.text}") for one in rounds[2]]
    usual = Usual.of([one for some in rounds for one in some])
    assert usual.spreads["new_phrases"].mean == 1 / 4
    assert "new_phrases" not in outside(usual.measures(rounds[0]))


def test_of_a_start_with_one_reply_to_each_prompt_every_other_prompt_is_held_against_the_rest() -> None:
    start = [one._replace(text=f"Lo and behold: {one.text}") if one.prompt % 2 else one for one in policy(0)]
    assert Usual.of(start).spreads["new_phrases"].mean == 1 / 2


@pytest.mark.parametrize(
    "replies",
    [
        [reply(0, "a b c")],
        [reply(0, "")],
        [reply(3, "a b"), reply(4, "a b")],
        [Reply(at, "", [], False, NAN, 0.0) for at in range(30)],
        [reply(at, "the same", float("inf")) for at in range(30)],
        [reply(0, f"one prompt {at}") for at in range(30)],
        [reply(at % 3, f"three prompts {at}", at) for at in range(12)],
        [reply(at, "今天天气很好我们去公园吧。" * (at % 3), at) for at in range(30)],
        [reply(at, f"שלום עולם {at} مرحبا", at) for at in range(30)],
        [reply(at, "ok 😀\ud800", at) for at in range(30)],
    ],
    ids=[
        "one",
        "one empty",
        "two",
        "empty",
        "the same",
        "one prompt",
        "three prompts",
        "Chinese",
        "right to left",
        "signs",
    ],
)
def test_whatever_the_replies_the_measures_are_numbers(usual: Usual, replies: list[Reply]) -> None:
    for known in (usual, Usual.of(replies), Usual.of(replies * 4), Usual.of(replies[:1]), Usual.of([])):
        measures = known.measures(replies)
        assert list(measures) == list(SIDES)
        for name, one in measures.items():
            assert math.isfinite(one.value) and math.isfinite(one.error) and one.error >= 0, name
            assert all(limit is None or math.isfinite(limit) for limit in one[2:]), name
        assert len(known.new_phrases(replies)) <= 12
    own = Usual.of(replies * 4)
    assert outside(own.measures(replies)) == set()


def test_without_replies_there_is_no_measure(usual: Usual) -> None:
    assert usual.measures([]) == {}
    assert usual.new_phrases([]) == []


def test_few_replies_have_wide_bands_and_errors(usual: Usual) -> None:
    many, few = usual.measures(policy(1)), usual.measures(policy(1)[:2])
    assert few["distinct_2"].error >= 2 * usual.spreads["distinct_2"].std
    assert few["length_correlation"].high > 0.99 > 0.8 > many["length_correlation"].high
    usually = usual.spreads["length"].mean
    assert few["length"].high - usually == pytest.approx(2 * (many["length"].high - usually))


def test_a_start_of_few_prompts_has_small_blocks() -> None:
    start = policy(0, rounds=4, prompts=5)
    assert Usual.of(start).block == 5
    assert outside(Usual.of(start).measures(policy(1, prompts=5))) == set()


def test_json_keeps_everything(usual: Usual) -> None:
    again = Usual.from_json(json.loads(json.dumps(usual.as_json(), allow_nan=False)))
    now = policy(3)
    now[::3] = [one._replace(text="Oh my! " + one.text) for one in now[::3]]
    assert again == usual
    assert again.measures(now) == usual.measures(now)
    assert again.new_phrases(now) == usual.new_phrases(now) != []


def test_every_measure_of_the_shipped_list_is_one(usual: Usual) -> None:
    assert set(module.phrases.shipped()) <= set(SIDES)
    assert set(module.SHARES) <= set(SIDES)
