"""A long-context test: does a model find one fact, at any depth of a text of any length?

A text of plain sentences hides several facts, each a number that belongs to a town; at its end it
begins the sentence of one of them again. The model chooses between the numbers: it must have read
the fact, and know which of them was asked for.

Source: Kamradt's needle in a haystack, with several keys as RULER's multi-key task (Hsieh et al.,
    arXiv 2404.06654). It deviates in that a model is not asked to write the number but which of
    those that stand in the text it holds likeliest, so that small models can be told apart.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from moe.errors import InputError

TOWNS = ('Arden', 'Bexley', 'Corvale', 'Dunmore', 'Elsing', 'Farrow', 'Gatley', 'Holbeck')
_WHO = ('The baker', 'A neighbour', 'The old clerk', 'One of the boys', 'The doctor', 'Her aunt')
_DID = ('walked past', 'spoke of', 'looked at', 'painted', 'forgot about', 'wrote about')
_WHAT = ('the mill', 'a blue door', 'the market', 'the river', 'a stone wall', 'the long road')
_WHEN = ('in spring', 'before noon', 'after the rain', 'last winter', 'on Sunday', 'at night')


@dataclasses.dataclass(frozen=True)
class Needle:
    """One question of the test.

    Attributes:
        text: the haystack with its needles, and the beginning of the sentence that is asked for.
        choices: how it may go on; the first one is right.
    """

    text: str
    choices: tuple[str, ...]


def needle(
    count: Callable[[str], int], *, length: int, depth: float, seed: Sequence[int], keys: int = 4
) -> Needle:
    """Makes a question; equal arguments make equal ones.

    Args:
        count: tokens of a text.
        length: tokens of text and choice at most; as many sentences are put in as have room.
        depth: where the needle stands, from 0, the beginning, to 1, right before the question.
        seed: of the sentences, the towns, the numbers and where the other needles stand.
        keys: needles in all; a guess is right once in that many times.

    Raises:
        InputError: where the needles alone are longer, or for a depth or keys out of range.
    """
    if not 0 <= depth <= 1 or not 2 <= keys <= len(TOWNS):
        raise InputError(
            f'A needle needs a depth from 0 to 1 and 2 to {len(TOWNS)} keys; received depth='
            f'{depth}, keys={keys}.'
        )
    generator = np.random.default_rng(seed)
    towns = generator.permutation(TOWNS)[:keys].tolist()
    numbers = [str(10_000 + n) for n in generator.choice(90_000, keys, replace=False)]
    facts = [_fact(town, value) for town, value in zip(towns, numbers, strict=True)]
    others = [(float(generator.random()), fact) for fact in facts[1:]]
    question = f' {_fact(towns[0], "")}'.rstrip(' .')
    choices = tuple(f' {value}' for value in numbers)
    room = length - max(map(count, choices))
    filler: list[str] = []
    # Sentences are about as long by themselves as among others: the last few are weighed together.
    used = count(_laid_out([], depth, facts[0], others) + question)
    while used < room:
        filler.append(_sentence(generator))
        used += count(f' {filler[-1]}')
    while (size := count(_laid_out(filler, depth, facts[0], others) + question)) > room:
        if not filler:
            raise InputError(
                f'A text with {keys} needles takes {size + length - room} tokens at least; '
                f'received length={length}. Make it longer, or ask for fewer keys.'
            )
        filler.pop()
    return Needle(_laid_out(filler, depth, facts[0], others) + question, choices)


def _fact(town: str, value: str) -> str:
    return f'The secret number of {town} is {value}.'


def _sentence(generator: np.random.Generator) -> str:
    parts = [words[generator.integers(len(words))] for words in (_WHO, _DID, _WHAT, _WHEN)]
    return f'{" ".join(parts)}.'


def _laid_out(
    filler: Sequence[str], depth: float, fact: str, others: Sequence[tuple[float, str]]
) -> str:
    """Puts each fact between two sentences, the one that is asked for right at its depth."""
    places = sorted(((at, text) for at, text in others), key=lambda place: place[0])
    before = [text for at, text in places if at < depth]
    after = [text for at, text in places if at >= depth]
    split = round(depth * len(filler))
    return ' '.join([*_spread(before, filler[:split]), fact, *_spread(after, filler[split:])])


def _spread(facts: Sequence[str], filler: Sequence[str]) -> list[str]:
    """Divides sentences evenly between facts."""
    parts = np.array_split(np.array(filler, object), len(facts) + 1)
    texts = list(parts[0])
    for fact, part in zip(facts, parts[1:], strict=True):
        texts += [fact, *part]
    return texts
