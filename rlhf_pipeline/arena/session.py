"""What is shown to people, what they answer, and what was learned of it: all that the server does, without HTTP."""

import random
import re
import threading
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_pipeline.arena import choosing, drift, learning, render
from rlhf_pipeline.arena.learning import Learning, Lesson
from rlhf_pipeline.arena.sources import Setup
from rlhf_pipeline.rundir import agreement, choices
from rlhf_pipeline.rundir.choices import Target
from rlhf_pipeline.rundir.items import Item, pair_key
from rlhf_pipeline.rundir.labels import OTHER, Asked, Choice, Label, Labels, Learnt, Pair
from rlhf_pipeline.use.web import Refused

LONGEST_REASON = 2000  # characters
LONGEST_LOOK = 86_400.0  # seconds; somebody went home
WAIT_S = 0.5  # for what was learned of a click; it is saved already
SLOW_S = 0.05  # a lesson that takes longer goes on beside the search for the next pair
BETA = 0.5  # of the policy that is worked out, where nobody says another; rewards are log-odds
SMALLEST_BETA, LARGEST_BETA = 1e-3, 1e3
ID = re.compile(r"[0-9A-Za-z-]{8,64}")


class Place(NamedTuple):
    """Where a pair is.

    Attributes:
        pair: it, in the order of the file of labels.
        replies: the numbers of its two replies among all replies of all items.
        item: the number of its item.
    """

    pair: Pair
    replies: tuple[int, int]
    item: int


class Session:
    """One set of items that people label; every method may be called from any thread.

    Args:
        setup: what is asked.
        labels: where the answers go.
        people: who may come.

    Raises:
        ValueError: there are not as many features as replies.
        InputError: the labels cannot be read.
    """

    def __init__(self, setup: Setup, labels: Labels, people: Sequence[str]) -> None:
        self.setup, self.file, self.people = setup, labels, list(people)
        self._saving = threading.RLock()  # held for as long as a click takes to be saved
        self._choosing = threading.RLock()  # and this one for as long as it takes to find the next pair
        self._places = _places(setup.items)
        self._replies = {key: place.replies for key, place in self._places.items()}
        self._turn_as_kept(labels.pairs(setup.stage))
        self._item_of = {key: setup.items[place.item].key for key, place in self._places.items()}
        self._checks = {key: None for key, place in self._places.items() if place.pair.better}  # in their order
        self._labels: list[Label] = []
        self._version: int | None = None
        self._learning: Learning | None = None
        if setup.features is not None:
            sizes = [len(item.replies) for item in setup.items]
            if len(setup.features) != sum(sizes):
                raise ValueError(f"there are features of {len(setup.features)} replies, and {sum(sizes)} replies")
            of_reply = np.repeat(np.arange(len(sizes)), sizes).tolist()
            self._learning = Learning(setup.features, of_reply, self._replies, self._note_learnt)
        self._read()

    def close(self) -> None:
        """Stop learning. The labels stay open."""
        if self._learning:
            self._learning.close()

    # What the page asks

    def state(self, person: str, is_owner: bool) -> dict[str, Any]:
        """All that the page shows when it is opened."""
        labels, setup = self._read(), self.setup
        target = setup.target._asdict() if setup.target and setup.mode == "label" else None
        return {
            "title": setup.title,
            "stage": setup.stage,
            "mode": setup.mode,
            "command": setup.command,
            "person": person,
            "is_owner": is_owner,
            "people": self.people,
            "dimensions": list(setup.dimensions),
            "target": target,
            "has_features": self._learning is not None,
            "progress": self._progress(person, labels),
            "learner": self._learner(),
            "ask": self.next(person),
        }

    def progress(self, person: str) -> dict[str, Any]:
        """How far all are, and how much of it a person has done."""
        return self._progress(person, self._read())

    def next(self, person: str) -> dict[str, Any] | None:
        """The pair that a person has on the page, or shall have; None where nothing is left to ask them."""
        with self._choosing:
            labels, stage = self._read(), self.setup.stage
            asked = self.file.asked(stage)
            own = asked.get(person)
            if own is None or own.pair not in self._places:
                made = [label for label in labels if label.person == person]
                found = choosing.choose(
                    person,
                    self._item_of,
                    self._checks,
                    labels,
                    asked,
                    per_item=self.setup.target.per_item if self.setup.target else None,
                    several=len(self.people) > 1,
                    draw=random.Random(f"{stage} {person} {len(made)}"),
                    informative=self._learning.most_informative if self._learning else None,
                )
                if found is None:
                    return None
                own = Asked(uuid.uuid4().hex, *found)
                self.file.ask(stage, person, own)
            return self._shown(own, sum(label.person == person for label in labels) + 1)

    def label(self, person: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what a person says of the pair that they have on the page.

        Args:
            person: who.
            body: `id`, `ask`, `choice`, and perhaps `dimensions`, `reason` and `seconds`.

        Raises:
            Refused: it is no answer, or none to that pair.
            InputError: it cannot be saved.
        """
        id_, ask = _text(body, "id"), _text(body, "ask")
        if not ID.fullmatch(id_):
            raise Refused(400, "`id` should be a UUID")
        with self._saving:
            label = self.file.label(id_)
            if label is None:
                asked = self.file.asked(self.setup.stage).get(person)
                if asked is None or asked.id != ask or asked.pair not in self._places:
                    raise Refused(409, "this pair is not on your page any more: it was answered in another window")
                label = self._label(person, body, id_, asked)
                self.file.add(label, self._places[asked.pair].pair)
                self._labels.append(label)
            elif label.person != person or label.stage != self.setup.stage:
                raise Refused(409, "there is a label with this `id` of another person")
        return self._answer(person, label)

    def undo(self, person: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Take back the last label of a person, who then has its pair on the page again.

        Args:
            person: who.
            body: perhaps `label`, the id of that label: then a request that is repeated takes back no second one.

        Raises:
            Refused: it is not as it should be.
        """
        wanted = body.get("label")
        if wanted is not None and not isinstance(wanted, str):
            raise Refused(400, "`label` should be text")
        with self._choosing, self._saving:  # in the order in which `next` takes them
            label = self.file.undo(person, self.setup.stage, wanted)
            if label is None:
                return {"saved": False}
            before = [one for one in self._labels if one.id != label.id]
            if len(before) < len(self._labels):
                self._labels = before
                self.file.ask(self.setup.stage, person, Asked(uuid.uuid4().hex, label.pair, label.left, label.how))
        return self._answer(person, None)

    def drift(self, person: str, beta: float = BETA) -> dict[str, Any] | None:
        """How far the reward would take a policy on the prompt that a person labelled last; None without a reward."""
        last = next((label for label in reversed(self._read()) if label.person == person), None)
        if last is None or last.pair not in self._places or self._learning is None:
            return None
        place = self._places[last.pair]
        item = self.setup.items[place.item]
        start = place.replies[0] - item.replies.index(place.pair.first)
        rewards = self._learning.rewards(range(start, start + len(item.replies)))
        beta = min(max(beta, SMALLEST_BETA), LARGEST_BETA)
        found = drift.tilted(rewards, beta)
        was = {place.replies[last.left] - start: "left", place.replies[1 - last.left] - start: "right"}
        gain = found.expected_reward - found.base_reward
        return {
            "beta": beta,
            "expected_reward": found.expected_reward,
            "base_reward": found.base_reward,
            "kl": found.kl,
            "text": f"With β = {beta:g} a policy over these {len(item.replies)} replies would gain {gain:.2f} of "
            f"reward, at a KL of {found.kl:.2f} nats from the one that sampled them.",
            "candidates": [
                {
                    "html": render.reply(reply),
                    "reward": float(rewards[number]),
                    "base_probability": 1 / len(item.replies),
                    "probability": float(found.probabilities[number]),
                    "was": was.get(number),
                }
                for number, reply in enumerate(item.replies)
            ],
        }

    def about_people(self) -> dict[str, Any]:
        """What is known of people, for the owner: `agreement.figures`, and `left_out`, whose labels do not count."""
        pairs, labels = {key: place.pair for key, place in self._places.items()}, self._read()
        out = self._left_out(labels) if self.setup.people else ()
        return agreement.figures(pairs, labels) | {"left_out": sorted(out)}

    # Inside

    def _label(self, person: str, body: Mapping[str, Any], id_: str, asked: Asked) -> Label:
        """A label from a request, in the order of its pair."""
        side: dict[str, Choice] = {"left": "first", "right": "second", "tie": "tie", "bad": "bad", "skip": "skip"}
        choice = body.get("choice")
        if not isinstance(choice, str) or choice not in side:
            raise Refused(400, f"`choice` should be one of {', '.join(side)}")
        dimensions = body.get("dimensions") or {}
        if not isinstance(dimensions, dict) or not dimensions.keys() <= set(self.setup.dimensions):
            raise Refused(400, f"`dimensions` should name some of {', '.join(self.setup.dimensions) or 'none'}")
        if not all(value in ("left", "right", "tie") for value in dimensions.values()):
            raise Refused(400, "of each of `dimensions`, one should be said of left, right and tie")
        reason = body.get("reason") or ""
        if not isinstance(reason, str) or len(reason) > LONGEST_REASON:
            raise Refused(400, f"`reason` should be text of at most {LONGEST_REASON} characters")
        seconds = body.get("seconds")
        if isinstance(seconds, bool) or not (seconds is None or isinstance(seconds, (int, float))):
            raise Refused(400, "`seconds` should be a number")
        if seconds is not None:
            seconds = min(max(float(seconds), 0.0), LONGEST_LOOK)
        as_shown = Label(
            id_,
            asked.pair,
            self.setup.stage,
            person,
            side[choice],
            0,
            {name: side[value] for name, value in dimensions.items()},
            reason,
            seconds,
            asked.how,
        )
        return as_shown.turned() if asked.left else as_shown

    def _answer(self, person: str, label: Label | None) -> dict[str, Any]:
        """What the page shows after a click, or after one was taken back."""
        labels, ask = self._read(), None
        number = self._learning.learn(labels) if self._learning else 0
        if self._learning and self._learning.lesson.seconds > SLOW_S:
            ask = self.next(person)  # meanwhile; of one label less than there are, the best pair is hardly another one
        in_time = self._learning is not None and self._learning.wait(number, WAIT_S)
        belief = None
        if self._learning and in_time and label is not None and label.pair in self._places:
            first, low, high = self._learning.belief(label.pair)
            left = (1 - first, 1 - high, 1 - low) if label.left else (first, low, high)
            belief = dict(zip(("left", "low", "high"), left, strict=True))
        return {
            "saved": True,
            "progress": self._progress(person, labels),
            "learner": self._learner(),
            "belief": belief,
            "drift": self.drift(person) if label is not None else None,
            "ask": ask or self.next(person),
        }

    def _progress(self, person: str, labels: Sequence[Label]) -> dict[str, Any]:
        setup = self.setup
        target = setup.target or Target()
        out = self._left_out(labels) if setup.people else ()
        found = choices.count(target, setup.items, self._item_of, labels, self._accuracy(), out)
        own = [label.choice for label in labels if label.person == person]
        return {
            "labels": found.labels,
            "wanted": target.labels,
            "per_item": {"done": found.items, "of": found.of},
            "mine": len(own) - own.count("skip"),
            "skipped": own.count("skip"),
            "reached": found.reached,
            "text": found.text,
        }

    def _left_out(self, labels: Sequence[Label]) -> set[str]:
        """The names of those whose labels do not count."""
        pairs = {key: place.pair for key, place in self._places.items()}
        return agreement.left_out(self.setup.people or {}, agreement.figures(pairs, labels)["people"])

    def _accuracy(self) -> float | None:
        if self._learning:
            accuracy = self._learning.lesson.accuracy
            return accuracy.accuracy if accuracy else None
        learnt = self.file.learnt(self.setup.stage)
        return learnt.accuracy if learnt else None

    def _learner(self) -> dict[str, Any] | None:
        return learning.as_json(self._learning.lesson) if self._learning else None

    def _note_learnt(self, lesson: Lesson) -> None:
        accuracy = lesson.accuracy
        learnt = Learnt(lesson.labels, accuracy.accuracy, accuracy.low, accuracy.high) if accuracy else None
        self.file.note_learnt(self.setup.stage, learnt)

    def _read(self) -> list[Label]:
        """The labels of these items, read again where another process has written some."""
        with self._saving:
            version = self.file.version()
            if version != self._version:
                self._version = version
                self._turn_as_kept(self.file.pairs(self.setup.stage))
                self._labels = [label for label in self.file.of(self.setup.stage) if label.pair in self._places]
                if self._learning:
                    self._learning.learn(self._labels)
            return list(self._labels)

    def _turn_as_kept(self, kept: Mapping[str, Pair]) -> None:
        """Have pairs in the order that the file of labels has them in."""
        for key, pair in kept.items():
            place = self._places.get(key)
            if place and place.pair.first != pair.first:
                better: Any = OTHER.get(place.pair.better or "")
                turned = place.pair._replace(first=pair.first, second=pair.second, better=better)
                self._replies[key] = (place.replies[1], place.replies[0])
                self._places[key] = Place(turned, self._replies[key], place.item)

    def _shown(self, asked: Asked, number: int) -> dict[str, Any]:
        """A pair as the page shows it; nothing in it says where it comes from, or why it is asked."""
        pair = self._places[asked.pair].pair
        left, right = (pair.second, pair.first) if asked.left else (pair.first, pair.second)
        return {
            "id": asked.id,
            "number": number,
            "prompt": render.prompt_html(pair.prompt),
            "turns": render.turns(pair.prompt),
            "left": render.reply(left),
            "right": render.reply(right),
            "dir": {
                "prompt": render.direction(pair.prompt),
                "left": render.direction(left),
                "right": render.direction(right),
            },
            "lengths": {"left": len(render.plain(left)), "right": len(render.plain(right))},
        }


def _places(items: Sequence[Item]) -> dict[str, Place]:
    """Every pair of all items by its key; of a pair that several have, the first one's."""
    found: dict[str, Place] = {}
    start = 0
    for number, item in enumerate(items):
        for first, second in item.pairs:
            better: Literal["first", "second"] | None = None
            if item.better is not None:
                better = "first" if item.better == 0 else "second"
            key = pair_key(item.prompt, item.replies[first], item.replies[second])
            pair = Pair(key, item.key, item.prompt, item.replies[first], item.replies[second], better)
            found.setdefault(key, Place(pair, (start + first, start + second), number))
        start += len(item.replies)
    return found


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise Refused(400, f"`{name}` should be text")
    return value
