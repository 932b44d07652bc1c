"""Needles: where they stand, how long the text is, and what makes another one."""

import re

import pytest

from distill.needle import TOWNS, needle
from moe.errors import InputError

FACT = re.compile(r'The secret number of (\w+) is (\d{5})\.')


def words(text: str) -> int:
    return len(text.split())


def made(**changes):
    return needle(words, **({'length': 300, 'depth': 0.5, 'seed': (7, 1)} | changes))


@pytest.mark.parametrize('depth', [0, 0.25, 0.5, 1])
@pytest.mark.parametrize('length', [60, 300])
def test_the_text_has_every_needle_once_and_asks_for_the_first(length, depth):
    question = made(length=length, depth=depth)
    *_, asked = question.text.split('. ')
    town = asked.removeprefix('The secret number of ').removesuffix(' is')
    facts = FACT.findall(question.text)
    assert len(facts) == len(question.choices) == 4
    assert dict(facts)[town] == question.choices[0].strip()
    assert {f' {number}' for _, number in facts} == set(question.choices)
    assert len(set(question.choices)) == 4
    assert {name for name, _ in facts} <= set(TOWNS)


@pytest.mark.parametrize('length', [45, 60, 61, 299, 300])
def test_the_text_is_as_long_as_it_may_be(length):
    question = made(length=length)
    # The shortest sentence has six words, so less than the longest is left over.
    size = words(question.text) + 1
    assert length - 12 < size <= length


def test_the_needle_stands_at_its_depth():
    for depth in (0, 0.25, 0.5, 0.75, 1):
        question = made(length=3000, depth=depth)
        sentences = question.text.split('. ')[:-1]
        plain = [s for s in sentences if 'secret number' not in s]
        at = next(i for i, s in enumerate(sentences) if s.endswith(question.choices[0]))
        before = sum('secret number' not in s for s in sentences[:at])
        assert abs(before / len(plain) - depth) < 0.01


def test_equal_arguments_make_equal_questions():
    assert made() == made()
    others = [made(seed=(7, 2)), made(seed=(8, 1)), made(depth=0.25), made(length=200)]
    assert len({question.text for question in [made(), *others]}) == 5


def test_what_cannot_be_made_is_refused():
    with pytest.raises(InputError, match=r'takes \d+ tokens at least; received length=20'):
        made(length=20)
    with pytest.raises(InputError, match=r'depth=1\.5'):
        made(depth=1.5)
    with pytest.raises(InputError, match='keys=9'):
        made(keys=9)
