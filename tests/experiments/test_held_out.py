"""Text of its own to hold out, instead of a share of what is trained on."""

import json
import types

import pytest
import tiny

from experiments.context import Context
from moe.errors import InputError

QUESTIONS = [{'question': f'what is {n}?', 'answer': f'{n} it is'} for n in range(6)]


def write(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)))
    return str(path)


def texts(tmp_path, trained, held_out, **settings):
    """The texts of both sides of a study of these rows."""
    config = tiny.get_config()
    config.data.source = write(tmp_path / 'train.jsonl', trained)
    config.data.held_out_source = write(tmp_path / 'test.jsonl', held_out)
    config.data.update(settings)
    stop = types.SimpleNamespace(agreed=lambda step: False)
    context = Context(config, str(tmp_path / 'run'), command='test', stop=stop)
    return [[document.text for document in side] for side in context.documents.split]


def test_all_of_it_is_held_out_and_none_is_trained_on(tmp_path):
    field = '{question} {answer}'
    train, held_out = texts(tmp_path, QUESTIONS[:5], QUESTIONS[3:], field=field)
    assert train == [f'what is {n}? {n} it is' for n in range(3)]
    assert held_out == [f'what is {n}? {n} it is' for n in range(3, 6)]
    with pytest.raises(InputError, match='text besides what is held out; all of its 2 documents'):
        texts(tmp_path, QUESTIONS[:2], QUESTIONS, field=field)


def test_its_rows_may_have_another_field(tmp_path):
    written = [{'text': 'the teacher wrote this'}, {'text': 'and this'}]
    field = '{question} {answer}'
    train, held_out = texts(tmp_path, written, QUESTIONS[:1], held_out_field=field)
    assert train == ['the teacher wrote this', 'and this']
    assert held_out == ['what is 0? 0 it is']
