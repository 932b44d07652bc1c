"""GSM8K: the number at the end of an answer, worked by hand, and what is asked."""

import json
from decimal import Decimal

import pytest

from distill.gsm8k import (
    Problem,
    draw_examples,
    is_correct,
    parse_answer,
    prompt,
    read_problems,
)
from moe.errors import InputError


@pytest.mark.parametrize(
    ('text', 'number'),
    [
        ('#### 18', '18'),
        ('She has 9 * 2 = $<<9*2=18>>18.\n#### 18', '18'),
        ('#### 1,234', '1234'),
        ('#### 2,125,000', '2125000'),
        ('#### -7', '-7'),
        ('#### - 7', '-7'),
        ('#### 0.25', '0.25'),
        ('#### .5', '0.5'),
        ('#### 18.00', '18'),
        ('#### $1,080.50 in all', '1080.5'),
        ('#### -$3', '-3'),
        ('#### 18.', '18'),
        ('####18', '18'),
        ('#### 5 %', '5'),
        # The first one counts: what comes after it answers a question of the model's own.
        ('#### 3\n\nQuestion: ...\n#### 4', '3'),
        ('18', None),
        ('', None),
        ('####', None),
        ('#### eighteen', None),
        ('### 18', None),
        ('####\n18', None),
        ('#### $', None),
    ],
)
def test_the_answer_is_the_number_after_the_marks(text, number):
    assert parse_answer(text) == (None if number is None else Decimal(number))


def test_an_answer_is_right_where_the_numbers_are_equal():
    problem = Problem('?', 'so\n#### 1,000')
    right = [' it is 1000.\n#### 1000', '#### 1,000.0', '#### $1,000']
    wrong = ['#### 100', '1000', '#### -1000', '#### 1000.5', 'no idea']
    assert [is_correct(text, problem) for text in right] == [True] * 3
    assert [is_correct(text, problem) for text in wrong] == [False] * 5
    # Nothing is not equal to nothing.
    assert not is_correct('no idea', Problem('?', 'no number either'))


def test_the_prompt_is_solved_examples_and_a_question():
    examples = [Problem('1+1?', '1+1=2\n#### 2'), Problem('2+2?', '#### 4')]
    assert prompt(examples, '3+3?') == (
        'Question: 1+1?\nAnswer: 1+1=2\n#### 2\n\nQuestion: 2+2?\nAnswer: #### 4\n\n'
        'Question: 3+3?\nAnswer:'
    )
    assert prompt([], '3+3?') == 'Question: 3+3?\nAnswer:'


def test_examples_are_drawn_by_seed():
    problems = [Problem(str(n), f'#### {n}') for n in range(20)]
    first = draw_examples(problems, 5, 0)
    assert first == draw_examples(problems, 5, 0)
    assert first != draw_examples(problems, 5, 1)
    assert len({problem.question for problem in first}) == 5
    assert sorted(p.question for p in draw_examples(problems, 20, 3)) == sorted(map(str, range(20)))
    with pytest.raises(InputError, match=r'21 solved examples.*has 20'):
        draw_examples(problems, 21, 0)


def test_a_file_is_read_and_every_broken_line_named(tmp_path):
    file = tmp_path / 'test.jsonl'
    records = [{'question': 'a?', 'answer': '#### 1'}, {'question': 'b?', 'answer': '#### 2'}]
    file.write_text('\n\n'.join(map(json.dumps, records)) + '\n')
    assert read_problems(file) == [Problem('a?', '#### 1'), Problem('b?', '#### 2')]
    broken = ['{"question": "a?"}', 'no json', '[1]', '{"question": "a?", "answer": "1"}']
    file.write_text('\n'.join([json.dumps(records[0]), *broken]))
    with pytest.raises(InputError, match='lines 2, 3, 4, 5 are none'):
        read_problems(file)
    file.write_text('\n')
    with pytest.raises(InputError, match='it has none'):
        read_problems(file)
    with pytest.raises(InputError, match='there is no such file'):
        read_problems(tmp_path / 'missing.jsonl')
