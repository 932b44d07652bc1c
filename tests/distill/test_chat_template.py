"""Conversations rendered as a published model's folder says."""

import json
from pathlib import Path

import pytest

from distill.chat_template import ChatTemplate
from moe.errors import InputError

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role not in ['user', 'assistant'] %}
{{ raise_exception('no ' + message.role) }}
{% endif %}
<{{ message.role }}>{{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""
MESSAGES = [{'role': 'user', 'content': '1 < 2?'}, {'role': 'assistant', 'content': 'yes'}]

SPECIAL = '{{ bos_token }},{{ eos_token }},{{ add_bos_token }}'


def folder_with(path: Path, template: str | None) -> Path:
    settings = {'bos_token': '[', 'eos_token': {'content': ']'}, 'chat_template': template}
    (path / 'tokenizer_config.json').write_text(json.dumps(settings))
    return path


@pytest.fixture(autouse=True)
def _jinja() -> None:
    pytest.importorskip('jinja2', reason='chat templates need the extra chat')


def test_a_conversation_by_hand(tmp_path: Path) -> None:
    template = ChatTemplate(folder_with(tmp_path, TEMPLATE))
    # Nothing is escaped, blocks leave no lines, and tokens of either form are known.
    assert template.render(MESSAGES) == '[<user>1 < 2?]\n<assistant>yes]\n'
    prompt = template.render(MESSAGES[:1], add_generation_prompt=True)
    assert prompt == '[<user>1 < 2?]\n<assistant>'


def test_special_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    """They may be in a file of their own, and one that is null is none, rather than a word."""
    settings = {'eos_token': None, 'add_bos_token': True, 'chat_template': SPECIAL}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    (tmp_path / 'special_tokens_map.json').write_text(json.dumps({'bos_token': {'content': '<s>'}}))
    assert ChatTemplate(tmp_path).render(MESSAGES[:1]) == '<s>,,'


def test_tools_and_documents_are_none(tmp_path: Path) -> None:
    folder_with(tmp_path, '{% if tools is not none or documents is not none %}Tools:{% endif %}')
    assert not ChatTemplate(tmp_path).render(MESSAGES)


def test_a_turn_that_is_begun_stays_open(tmp_path: Path) -> None:
    """What a template strips of the last turn is no part of it."""
    begun = [*MESSAGES[:1], {'role': 'assistant', 'content': ' The answer: '}]
    template = ChatTemplate(folder_with(tmp_path, TEMPLATE))
    assert template.render_begun(begun) == '[<user>1 < 2?]\n<assistant> The answer: '
    trimmed = TEMPLATE.replace('message.content', 'message.content | trim')
    template = ChatTemplate(folder_with(tmp_path, trimmed))
    assert template.render_begun(begun) == '[<user>1 < 2?]\n<assistant>The answer: '
    with pytest.raises(InputError, match="leaves out that of 'assistant'"):
        ChatTemplate(folder_with(tmp_path, 'x')).render_begun(begun)


def test_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    folder_with(tmp_path, 'old')
    (tmp_path / 'chat_template.jinja').write_text('{{ messages | tojson }}')
    assert ChatTemplate(tmp_path).render([{'role': 'é'}]) == '[{"role": "é"}]'


def test_what_is_refused(tmp_path: Path) -> None:
    template = ChatTemplate(folder_with(tmp_path, TEMPLATE))
    with pytest.raises(InputError, match='no system'):
        template.render([{'role': 'system', 'content': ''}])
    with pytest.raises(InputError, match='must have a chat template'):
        ChatTemplate(folder_with(tmp_path, None))
    with pytest.raises(InputError, match='no Jinja template'):
        ChatTemplate(folder_with(tmp_path, '{% if %}'))
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match='does not take this conversation'):
        ChatTemplate(folder_with(tmp_path, escape)).render(MESSAGES)
