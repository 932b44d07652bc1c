"""GSM8K: school problems in words, judged by the number at the end of the answer.

Source: Cobbe et al., 'Training verifiers to solve math word problems', arXiv 2110.14168.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import numpy as np

from moe.errors import InputError

# A model that goes on after its answer asks itself the next question.
STOP = 'Question:'
_ANSWER = re.compile(r'####[ \t]*(-?)[ \t]*\$?[ \t]*(-?)([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)')


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem in words.

    Attributes:
        question: what is asked.
        answer: the steps to the answer, the last of them '#### ' and the number.
    """

    question: str
    answer: str


def parse_answer(text: str) -> Decimal | None:
    """Returns the number that an answer ends in: the first one that `####` stands before.

    Commas group digits, a dollar sign is left out, and 18.00 is 18. None where there is no number.
    """
    found = _ANSWER.search(text)
    if found is None:
        return None
    before, after, digits = found.groups()
    try:
        number = Decimal(digits.replace(',', ''))
    except InvalidOperation:
        return None
    return -number if (before or after) else number


def is_correct(text: str, problem: Problem) -> bool:
    """Whether an answer ends in the problem's own number."""
    return parse_answer(text) is not None and parse_answer(text) == parse_answer(problem.answer)


def prompt(examples: Sequence[Problem], question: str) -> str:
    """Returns the text that a model continues with its answer: solved examples, then the question.

    It is that of the task `gsm8k` of lm-eval.
    """
    solved = ''.join(f'Question: {p.question}\nAnswer: {p.answer}\n\n' for p in examples)
    return f'{solved}Question: {question}\nAnswer:'


def conversation(
    examples: Sequence[Problem], question: str, *, system: str | None, multiturn: bool
) -> list[dict[str, str]]:
    """Returns the turns that a model of conversations answers, as lm-eval makes them of `prompt`.

    Args:
        examples: solved problems.
        question: what is asked.
        system: what stands first; None for nothing.
        multiturn: whether each example is a question and an answer of its own, rather than a part
            of the one question.
    """
    turns = [] if system is None else [('system', system)]
    if multiturn:
        for example in examples:
            turns += [('user', prompt([], example.question)), ('assistant', example.answer)]
        examples = []
    turns.append(('user', prompt(examples, question)))
    return [{'role': role, 'content': content} for role, content in turns]


def draw_examples(problems: Sequence[Problem], count: int, seed: int) -> list[Problem]:
    """Draws the examples that stand before every question; equal seeds draw equal ones.

    Raises:
        InputError: where there are fewer.
    """
    if count > len(problems):
        raise InputError(
            f'{count} solved examples are asked for, and the train file has {len(problems)}. Ask '
            'for fewer.'
        )
    chosen = np.random.default_rng(seed).choice(len(problems), count, replace=False)
    return [problems[index] for index in chosen]


def read_problems(path: str | os.PathLike[str]) -> list[Problem]:
    """Reads a `.jsonl` file of `question` and `answer`.

    Raises:
        InputError: naming every line that is no problem whose answer ends in '#### ' and a number.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise InputError(f'{file} must be a .jsonl file of GSM8K; there is no such file.')
    problems, broken = [], []
    for number, line in enumerate(file.read_bytes().split(b'\n'), start=1):
        if line.strip():
            try:
                problems.append(_problem(line))
            except (ValueError, KeyError, TypeError):
                broken.append(number)
    if broken or not problems:
        which = f'lines {", ".join(map(str, broken[:16]))} are none' if broken else 'it has none'
        raise InputError(
            f"{file}: every line must be a JSON object with 'question' and an 'answer' that ends "
            f"in '#### ' and a number; {which}."
        )
    return problems


def _problem(line: bytes) -> Problem:
    record = json.loads(line)
    problem = Problem(str(record['question']), str(record['answer']))
    if parse_answer(problem.answer) is None:
        raise ValueError('no number')
    return problem
