"""The questions of the task python_endings: what a program that breaks off goes on with.

Names are drawn for every question.
"""

import importlib
import random
from typing import Any

_NAMES = 'args data error field group index item key line name node path result size text value'
# A program with its names left open, and its endings, the right one first.
_FORMS = (
    ('    for {a} in {b}.{c}', (':\n', ')\n', '\n', ' =')),
    ('    if {a} is not {b}.{c}', (':\n', ')\n', '\n', ' =')),
    ('    def {a}(self, {b}, {c})', (':\n', '\n', ' =', ',')),
    ('    {a} = {b}({c}', (')\n', ']\n', '}}\n', ':\n')),
    ('    {a}.{b} = {c}[{d}', (']\n', ')\n', '}}\n', ':\n')),
    ('    return {a}.{b}({c}[0]', (')\n', ']\n', '}}\n', ':\n')),
    ('from {a}.{b}.{c}', (' import', ' except', ' return', ' as')),
    ('    try:\n        {a}.{b}({c})\n    ', ('except', 'import', 'while', 'return')),
    ('    assert {a}.{b}[{c}]', (' is', ' import', ' def', ' try')),
    ('    {a} = {b} if {c}', (' else', ' import', ' except', ' def')),
    ('    while {a}.{b} < {c}', (':\n', ')\n', '\n', ' =')),
    ('    with open({a}.{b}, {c})', (' as', ' in', ' is', ' if')),
)


def questions(*, count: int, seed: int, **_: Any) -> dict[str, Any]:
    """Makes the questions, no two alike, as lm-eval wants them, by split.

    Args:
        count: of questions.
        seed: of names and of the order of the endings.
    """
    datasets: Any = importlib.import_module('datasets')
    drawn = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        row = _question(drawn, *_FORMS[len(rows) % len(_FORMS)])
        rows[row['text']] = row
    return {'test': datasets.Dataset.from_list(list(rows.values()))}


def _question(drawn: random.Random, form: str, endings: tuple[str, ...]) -> dict[str, Any]:
    names = dict(zip('abcd', drawn.sample(_NAMES.split(), 4), strict=True))
    choices = drawn.sample([ending.format() for ending in endings], len(endings))
    right = endings[0].format()
    return {'text': form.format(**names), 'choices': choices, 'gold': choices.index(right)}
