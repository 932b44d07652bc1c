"""What a teacher was trained on cannot be held out for its students."""

import pytest

from distill.sources import Document
from experiments.seen import record_seen, refuse_seen
from moe.errors import InputError


def documents(*texts: str) -> list[Document]:
    return [Document(f'name {i}', text) for i, text in enumerate(texts)]


def test_unseen_text_may_be_held_out_under_any_name(tmp_path):
    record_seen(tmp_path, documents('a', 'b', 'c'))
    refuse_seen(tmp_path, documents('d', 'e'), key='config.a')
    with pytest.raises(InputError, match=r'2 of 3 held-out documents were training text'):
        refuse_seen(tmp_path, documents('c', 'd', 'a'), key='config.a')


def test_a_folder_without_a_record_is_no_teacher(tmp_path):
    with pytest.raises(InputError, match=r'documents\.json; there is none'):
        refuse_seen(tmp_path, documents('a'), key='config.a')
