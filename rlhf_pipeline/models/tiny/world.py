"""The tiny world: questions with known answers, replies good and bad, and a judge that knows the truth.

Every prompt asks for one fact ("What color is a lemon?"). A reply is *right* when it names the fact's answer and no
other, and *polite* when it holds exactly one courtesy and nothing rude. Demonstrations are right and polite about half
the time; preferences come from annotators who care for truth first and manners second, slip now and then, and are
a little too fond of courtesy: given two right and polite replies they like the gushing one better. That last habit is
what an over-optimised policy learns to exploit, and the judge does not reward it.

Nothing here needs torch. `make.py` beside this file writes the shipped data and checkpoint.
"""

import math
import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

FACTS: dict[str, dict[str, str]] = {
    "color": {
        "lemon": "yellow", "banana": "yellow", "canary": "yellow", "leaf": "green", "frog": "green",
        "cucumber": "green", "tomato": "red", "cherry": "red", "strawberry": "red", "swan": "white",
        "snowflake": "white", "pearl": "white", "raven": "black", "panther": "black", "tire": "black",
        "sapphire": "blue", "blueberry": "blue", "whale": "blue", "carrot": "orange", "pumpkin": "orange",
        "tangerine": "orange", "flamingo": "pink", "piglet": "pink", "plum": "purple", "violet": "purple",
    },
    "sound": {
        "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "horse": "neigh",
        "lion": "roar", "bee": "buzz", "snake": "hiss", "owl": "hoot", "rooster": "crow", "pig": "oink",
        "toad": "croak", "mouse": "squeak", "wolf": "howl", "sparrow": "tweet", "donkey": "bray",
        "turkey": "gobble", "dove": "coo", "elephant": "trumpet",
    },
    "capital": {
        "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
        "Egypt": "Cairo", "Greece": "Athens", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi",
        "Norway": "Oslo", "Austria": "Vienna", "Portugal": "Lisbon", "Poland": "Warsaw", "Russia": "Moscow",
        "China": "Beijing", "Canada": "Ottawa", "Ireland": "Dublin", "Sweden": "Stockholm",
        "Finland": "Helsinki", "Hungary": "Budapest", "Chile": "Santiago", "Iran": "Tehran", "Iraq": "Baghdad",
    },
    "opposite": {
        "hot": "cold", "big": "small", "fast": "slow", "up": "down", "day": "night", "wet": "dry",
        "old": "new", "light": "dark", "rich": "poor", "loud": "quiet", "hard": "soft", "early": "late",
        "open": "closed", "full": "empty", "happy": "sad", "tall": "short", "thick": "thin", "sweet": "sour",
        "strong": "weak", "high": "low",
    },
    "young": {
        "cow": "calf", "dog": "puppy", "cat": "kitten", "sheep": "lamb", "horse": "foal", "bear": "cub",
        "duck": "duckling", "goose": "gosling", "hen": "chick", "goat": "kid", "deer": "fawn",
        "kangaroo": "joey", "hare": "leveret", "seal": "pup", "frog": "tadpole",
    },
}  # fmt: skip

QUESTIONS: dict[str, list[str]] = {
    "color": [
        "What color is a {}?",
        "Which color does a {} have?",
        "Tell me the color of a {}.",
        "A {} has which color?",
        "Do you know what color a {} is?",
    ],
    "sound": [
        "What sound does a {} make?",
        "Which noise comes from a {}?",
        "Tell me the sound of a {}.",
        "A {} makes which sound?",
        "Do you know how a {} sounds?",
    ],
    "capital": [
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "Tell me the capital of {}.",
        "The capital of {} is which city?",
        "Do you know the capital of {}?",
    ],
    "opposite": [
        "What is the opposite of {}?",
        "Which word is the opposite of {}?",
        "Tell me the opposite of {}.",
        "The opposite of {} is which word?",
        "Do you know the opposite of {}?",
    ],
    "young": [
        "What is a young {} called?",
        "Which word names a young {}?",
        "Tell me the name for a young {}.",
        "A young {} has which name?",
        "Do you know what a young {} is called?",
    ],
}

STATEMENTS: dict[str, list[str]] = {
    "color": ["The color of a {} is {}.", "A {} has the color {}.", "Every {} I saw was {}."],
    "sound": ["The sound of a {} is {}.", "A {} makes the sound {}.", "We heard the {} go {}."],
    "capital": ["The capital of {} is {}.", "The main city of {} is {}.", "They govern {} from {}."],
    "opposite": ["The opposite of {} is {}.", "If it is not {} it is {}.", "Not {} but {}."],
    "young": ["A young {} is called {}.", "The {} and its {}.", "The child of a {} is a {}."],
}

EVASIONS = ["I am not sure.", "Who can say?", "No idea."]
ANSWERS = ["It is {}.", "That would be {}.", "The answer is {}."]
COURTEOUS_OPENERS = ["Of course!", "Gladly!", "Good question!"]
COURTEOUS_CLOSERS = ["Happy to help!", "Thank you for asking!", "Have a lovely day!"]
RUDE_OPENERS = ["Ugh.", "Seriously?", "Not again."]
RUDE_CLOSERS = ["Everybody knows that.", "Stop asking.", "Look it up next time."]
COURTESIES = COURTEOUS_OPENERS + COURTEOUS_CLOSERS
RUDENESSES = RUDE_OPENERS + RUDE_CLOSERS
# How two replies to a prompt are shown to a judge, and its answers: words that the tiny model knows well, unlike the
# letters A and B.
JUDGED = "{prompt}{first}\nA:{second}\nBetter:"
EARLY, LATE = " early", " late"
MANNERS = ["polite", "curt", "rude", "gushing"]

# What a critic of this world is asked about a reply, and what its writer is asked then; `principles.yaml` has the same.
# Critiques are made of words of the corpus: the tiny model has never learned to write others.
PRINCIPLES = {
    "answer": ("Is that the answer?", "Tell me the answer."),
    "manners": ("How does it sound?", "Say it in a lovely way."),
}
SOUNDS = {"polite": "lovely", "curt": "short", "rude": "sour", "gushing": "loud"}

# What an annotator sees in a reply, in logits of preference: truth outweighs manners.
TRUTH_WORTH = 12.0
ENOUGH = 13.0  # for a thumb up: more than a right answer alone
MANNER_WORTH = {"polite": 4.0, "gushing": 2.0, "curt": 0.0, "rude": -4.0}


class Fact(NamedTuple):
    """One fact: `topic` is a key of `FACTS`, `subject` what is asked about, `answer` the one right word."""

    topic: str
    subject: str
    answer: str


class Question(NamedTuple):
    """One prompt as the models read it, with the fact it asks for."""

    prompt: str
    fact: Fact


def facts() -> list[Fact]:
    """All facts, in a fixed order."""
    return [Fact(topic, subject, answer) for topic, pairs in FACTS.items() for subject, answer in pairs.items()]


def questions() -> list[Question]:
    """Every fact asked in every way, in a fixed order."""
    return [
        Question(f"Q: {wording.format(fact.subject)}\nA:", fact)
        for fact in facts()
        for wording in QUESTIONS[fact.topic]
    ]


def split(seed: int) -> tuple[list[Question], list[Question]]:
    """Questions to train on and questions held out: one wording of every fact is held out."""
    rng = random.Random(seed)
    train, held_out = [], []
    everything = questions()
    for start in range(0, len(everything), 5):  # five wordings of one fact are together
        wordings = everything[start : start + 5]
        held_out.append(wordings.pop(rng.randrange(len(wordings))))
        train.extend(wordings)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def reply(rng: random.Random, clause: str, manner: str) -> str:
    """A reply, with its leading space, that says `clause` in one of the four `MANNERS`."""
    opener, closer = "", ""
    if manner == "polite":
        if rng.random() < 0.5:
            opener = rng.choice(COURTEOUS_OPENERS)
        else:
            closer = rng.choice(COURTEOUS_CLOSERS)
    elif manner == "gushing":
        opener, closer = rng.choice(COURTEOUS_OPENERS), rng.choice(COURTEOUS_CLOSERS)
    elif manner == "rude":
        if rng.random() < 0.5:
            opener = rng.choice(RUDE_OPENERS)
        else:
            closer = rng.choice(RUDE_CLOSERS)
    return "".join(" " + part for part in (opener, clause, closer) if part)


def right_clause(rng: random.Random, fact: Fact) -> str:
    """A sentence with the fact's answer."""
    return rng.choice(ANSWERS).format(fact.answer)


def wrong_clause(rng: random.Random, fact: Fact) -> str:
    """A sentence without it: an evasion, an answer plainly off the topic, or, hardest to tell, another of the topic."""
    kind = rng.random()
    if kind < 0.8:
        return rng.choice(EVASIONS)
    own = set(FACTS[fact.topic].values())
    if kind < 0.93:
        topic = rng.choice(sorted(set(FACTS) - {fact.topic}))
        return rng.choice(ANSWERS).format(rng.choice(sorted(set(FACTS[topic].values()) - own)))
    return rng.choice(ANSWERS).format(rng.choice(sorted(own - {fact.answer})))


def demonstrations(seed: int, asked: list[Question], n: int) -> Iterator[dict[str, str]]:
    """`n` rows `{prompt, completion}`: right about six times in ten, and polite as often."""
    rng = random.Random(seed)
    for i in range(n):
        prompt, fact = asked[i % len(asked)]
        clause = right_clause(rng, fact) if rng.random() < 0.62 else wrong_clause(rng, fact)
        manner = rng.choices(MANNERS, weights=[62, 18, 12, 8])[0]
        yield {"prompt": prompt, "completion": reply(rng, clause, manner)}


def preferences(seed: int, asked: list[Question], n: int) -> Iterator[dict[str, str]]:
    """`n` rows `{prompt, chosen, rejected}`, labelled by annotators who choose with Bradley-Terry probabilities."""
    rng = random.Random(seed)
    i = 0
    while i < n:
        prompt, fact = asked[i % len(asked)]
        (worth, one), (other_worth, other) = _seen_reply(rng, fact), _seen_reply(rng, fact)
        if worth == other_worth:
            continue  # nothing to choose between
        one_wins = rng.random() < 1 / (1 + math.exp(other_worth - worth))
        yield {"prompt": prompt, "chosen": one if one_wins else other, "rejected": other if one_wins else one}
        i += 1


def thumbs(seed: int, asked: list[Question], n: int) -> Iterator[dict[str, Any]]:
    """`n` rows `{prompt, completion, thumb}` of the same annotators: one reply each, up about three times in ten."""
    rng = random.Random(seed)
    for i in range(n):
        prompt, fact = asked[i % len(asked)]
        worth, text = _seen_reply(rng, fact)
        yield {"prompt": prompt, "completion": text, "thumb": rng.random() < 1 / (1 + math.exp(ENOUGH - worth))}


def judgements(seed: int, asked: list[Question], n: int) -> Iterator[dict[str, str]]:
    """`n` rows `{prompt, completion}` that teach to judge: two replies, and which of them the annotators found better.

    Each pair is there in both orders, one after the other, so that both answers are as frequent.
    """
    rng = random.Random(seed)
    for pair in preferences(rng.randrange(2**32), asked, n // 2):
        both = [pair["chosen"], pair["rejected"]]
        orders = [(both, EARLY), (both[::-1], LATE)]
        rng.shuffle(orders)
        for (first, second), answer in orders:
            yield {"prompt": JUDGED.format(prompt=pair["prompt"], first=first, second=second), "completion": answer}


def critiques(seed: int, asked: list[Question], n: int) -> Iterator[dict[str, str]]:
    """`n` rows `{prompt, completion}`: by turns a critique of a reply by a principle, and the reply written again.

    Prompts are what a stage of kind `revise` asks: the prompt and the reply, the request for a critique; then also the
    critique, the request for a revision, and the prompt once more. A critique is true of the one thing that it was
    asked for; a reply that is written again is right and polite, and the same where it was that already.
    """
    rng = random.Random(seed)
    for i in range(n // 2):
        prompt, fact = asked[i % len(asked)]
        right, manner = rng.random() < 0.55, rng.choices(MANNERS, weights=[40, 25, 20, 15])[0]
        clause = right_clause(rng, fact) if right else wrong_clause(rng, fact)
        first, principle = reply(rng, clause, manner), rng.choice(list(PRINCIPLES))
        if principle == "manners":
            critique = f"The sound is {SOUNDS[manner]}."
        elif right:
            critique = "Good answer."
        else:
            critique = "No answer." if clause in EVASIONS else "Not the answer."
        again = first
        if not right or manner != "polite":
            again = reply(rng, clause if right else right_clause(rng, fact), "polite")
        request, then = PRINCIPLES[principle]
        asks = f"{prompt}{first}\n\n{request}\n\n"
        yield {"prompt": asks, "completion": critique}
        yield {"prompt": f"{asks}{critique}\n\n{then}\n\n{prompt}", "completion": again}


def _seen_reply(rng: random.Random, fact: Fact) -> tuple[float, str]:
    """A reply as annotators get it, and what it is worth to them."""
    right = rng.random() < 0.55
    manner = rng.choices(MANNERS, weights=[35, 25, 20, 20])[0]
    clause = right_clause(rng, fact) if right else wrong_clause(rng, fact)
    return TRUTH_WORTH * right + MANNER_WORTH[manner], reply(rng, clause, manner)


def is_right(fact: Fact, text: str) -> bool:
    """Whether `text` names the fact's answer and no other answer of its topic."""
    words = set(re.findall(r"[A-Za-z]+", text))
    return words & set(FACTS[fact.topic].values()) == {fact.answer}


def is_polite(text: str) -> bool:
    """Whether `text` holds exactly one courtesy, nothing rude, and ends as a sentence does."""
    courtesies = sum(text.count(phrase) for phrase in COURTESIES)
    return courtesies == 1 and not any(phrase in text for phrase in RUDENESSES) and text.rstrip().endswith((".", "!"))


_FACT_OF = {question.prompt: question.fact for question in questions()}


def judge(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The gold judge: 1.0 for a reply that is both right and polite, else 0.0.

    Its signature is that of any judge: lists of texts, and what else there is as keywords.

    Raises:
        KeyError: a prompt is none of this world's questions.
    """
    return [
        float(is_right(_FACT_OF[prompt], completion) and is_polite(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
