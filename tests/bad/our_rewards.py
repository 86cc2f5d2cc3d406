"""Reward functions and judges as they should not be."""


def too_few(completions):
    return [1.0]


def text(completions):
    return ["good" for _ in completions]


def no_number(completions):
    return [float("nan") for _ in completions]


def raises(completions):
    raise ValueError("no idea")


def of_a_column(completions, solution):
    return [float(one == right) for one, right in zip(completions, solution, strict=True)]


def raises_of_two(firsts, seconds):
    raise ValueError("no idea")


def names_neither(firsts, seconds):
    return ["both" for _ in firsts]
