"""The journal of a remote teacher: whole lines count, a torn one does not, nothing is lost."""

import json

import pytest

from distill.answer_ledger import AnswerLedger
from distill.budget import Cost
from moe.errors import InputError

TERMS = {'model': 'big', 'provenance': {'licence': 'MIT'}}


def open_ledger(folder, terms=TERMS):
    return AnswerLedger(folder / 'sub' / 'ledger.jsonl', terms)


def test_keeps_answers_and_what_they_cost(tmp_path):
    with open_ledger(tmp_path) as ledger:
        ledger.asked('a', Cost(10, 0.5))
        ledger.ended('a', 'answered', Cost(7, 0.25), record={'text': 'ü\n"'})
        ledger.asked('b', Cost(10, 0.5))
        ledger.ended('b', 'refused', Cost(), reason='429')
        ledger.asked('b', Cost(10, 0.5))
        ledger.ended('b', 'quarantined', Cost(10, 0.5), reason='no text', answer='{')
        ledger.asked('c', Cost(3))
        ledger.ended('c', 'lost', Cost(3), reason='reset')
    with open_ledger(tmp_path) as ledger:
        outcomes = [ledger.outcome(key) for key in 'abcd']
        assert outcomes == ['answered', 'quarantined', None, None]
        assert ledger.entry('a')['record'] == {'text': 'ü\n"'}
        assert ledger.entry('b')['reason'] == 'no text'
        assert ledger.spent == Cost(20, 0.75)
        assert not ledger.cut_off


def test_what_was_under_way_at_a_kill_counts_at_the_most_it_can_cost(tmp_path):
    with open_ledger(tmp_path) as ledger:
        ledger.asked('a', Cost(10))
    for _ in range(2):  # to look is not to ask
        with open_ledger(tmp_path) as ledger:
            assert ledger.outcome('a') is None
            assert ledger.cut_off == {'a'}
            assert ledger.spent == Cost(10)
    with open_ledger(tmp_path) as ledger:
        ledger.asked('a', Cost(10))  # and killed once more
    with open_ledger(tmp_path) as ledger:
        assert ledger.spent == Cost(20)
        ledger.asked('a', Cost(10))
        ledger.ended('a', 'answered', Cost(4), record=1)
        assert ledger.spent == Cost(24)
    with open_ledger(tmp_path) as ledger:
        assert ledger.spent == Cost(24)
        assert not ledger.cut_off


def test_any_torn_end_leaves_the_whole_lines(tmp_path):
    with open_ledger(tmp_path) as ledger:
        ledger.asked('a', Cost(1))
        ledger.ended('a', 'answered', Cost(1), record='ä')
        ledger.asked('b', Cost(2))
        ledger.ended('b', 'answered', Cost(2), record='b')
    file = tmp_path / 'sub' / 'ledger.jsonl'
    whole = file.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord('\n')]
    # State after each number of whole lines: of the head, a asked, a ended, b asked, b ended.
    spent = [0, 0, 1, 1, 3, 3]
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        lines = sum(end <= cut for end in ends)
        with open_ledger(tmp_path) as ledger:
            assert ledger.spent.tokens == spent[lines]
            assert (ledger.outcome('a') is not None) == (lines >= 3)
            ledger.asked('z', Cost(100))
            ledger.ended('z', 'answered', Cost(100), record=cut)
        with open_ledger(tmp_path) as ledger:
            assert ledger.entry('z')['record'] == cut
            if lines >= 3:
                assert ledger.entry('a')['record'] == 'ä'


def test_other_terms_are_refused_by_name(tmp_path):
    open_ledger(tmp_path).close()
    other = {'model': 'big', 'provenance': {'licence': 'none'}}
    with pytest.raises(InputError, match=r"provenance.licence: 'MIT' there, 'none' here"):
        open_ledger(tmp_path, other)
    open_ledger(tmp_path).close()  # the file is free again


def test_damage_before_the_end_is_told_with_its_line(tmp_path):
    with open_ledger(tmp_path) as ledger:
        ledger.asked('a', Cost(1))
        ledger.ended('a', 'answered', Cost(1), record=1)
    file = tmp_path / 'sub' / 'ledger.jsonl'
    lines = file.read_text().splitlines()
    lines[1] = lines[1][:-4]
    file.write_text('\n'.join(lines) + '\n')
    with pytest.raises(InputError, match='line 2: must be a line of the ledger'):
        open_ledger(tmp_path)


def test_one_process_at_a_time(tmp_path):
    with open_ledger(tmp_path), pytest.raises(InputError, match='open in another process'):
        open_ledger(tmp_path)
    open_ledger(tmp_path).close()


def test_every_line_is_json(tmp_path):
    with open_ledger(tmp_path) as ledger:
        ledger.asked('a', Cost(1, 0.1))
        ledger.ended('a', 'quarantined', Cost(1, 0.1), reason='x')
    lines = (tmp_path / 'sub' / 'ledger.jsonl').read_text().splitlines()
    assert [sorted(json.loads(line)) for line in lines] == [
        ['ledger', 'terms'],
        ['asked', 'most'],
        ['as', 'cost', 'ended', 'reason'],
    ]
