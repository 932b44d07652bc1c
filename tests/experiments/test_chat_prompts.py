"""Conversations with a published model: its folder's chat template decides what it reads."""

import json
import shutil
import signal
import sys
import types
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from starlette.testclient import TestClient

import moe
from distill.pretrained_tokenizer import PretrainedTokenizer, write_pretrained
from distill.tokenizer import ByteTokenizer
from experiments import generate
from experiments.chat_prompts import chat_prompts
from experiments.loaded import Loaded
from experiments.serve_app import App
from experiments.serve_requests import NEXT_TURN, read_chat
from moe.config import AttentionConfig, TransformerConfig
from moe.engine import Engine
from moe.errors import InputError
from moe.requests import EngineConfig
from moe.transformer import Transformer

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}
<{{ message.role }}>{{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
# Of two parts; what spells no special token stays text.
MESSAGES = [{'role': 'user', 'content': [{'text': 'ü <'}, {'text': 'b>'}]}]
SYSTEM = [{'role': 'system', 'content': 'x'}]
BYTES = ByteTokenizer()
IDS = (BYTES.bos_id, *'<user>ü <b>'.encode(), BYTES.eos_id, *b'\n<assistant>')
ENDS = (BYTES.eos_id, ord('!'))


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """A published folder without a template, of a model that nobody trained."""
    path = tmp_path_factory.mktemp('published')
    config = TransformerConfig(264, 1, 8, 8, AttentionConfig(2, 2, 4, 'head'))
    variables = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), np.ones((1, 1), int)))
    write_pretrained(BYTES, path / 'tokenizer')
    moe.save_pretrained(path / 'm', config, variables, tokenizer=path / 'tokenizer', card='tiny')
    return path / 'm'


@pytest.fixture
def folder(plain, tmp_path):
    pytest.importorskip('jinja2', reason='chat templates need the extra chat')
    folder = tmp_path / 'model'
    shutil.copytree(plain, folder)
    (folder / 'chat_template.jinja').write_text(TEMPLATE)
    # A turn may end with another token than a text; the engine writes none past the tokenizer's.
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [*ENDS, 999]}))
    return folder


@pytest.fixture
def prompts_of(monkeypatch, tmp_path):
    """Runs the command on lines; returns the requests that its engine was given."""
    requests, submit = [], Engine.submit
    monkeypatch.setattr(Engine, 'submit', lambda *args: requests.append(args[1]) or submit(*args))
    handler = signal.getsignal(signal.SIGTERM)
    generate.flags.FLAGS.mark_as_parsed()

    def run(folder, *records, out='out.jsonl'):
        (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, records)))
        settings = {'max_new_tokens': 2, 'rows': 2, 'max_length': 48}
        paths = {'prompts': str(tmp_path / 'in.jsonl'), 'out': str(tmp_path / out)}
        with flagsaver.flagsaver(checkpoint=str(folder), **paths, **settings):
            generate.main()
        return requests

    yield run
    signal.signal(signal.SIGTERM, handler)


def loaded(folder):
    model: Any = None
    return Loaded('tiny', model, None, PretrainedTokenizer(folder), '', folder)


def test_the_command_reads_what_the_template_writes(prompts_of, folder):
    records = {'messages': MESSAGES}, {'prompt': 'a'}
    chat, text = prompts_of(folder, *records)
    assert chat.prompt == IDS
    assert chat.stop_ids == ENDS
    assert text.prompt == (BYTES.bos_id, ord('a'))
    assert text.stop_ids == (BYTES.eos_id,)
    (folder / 'chat_template.jinja').write_text(TEMPLATE.lower().replace('<', '['))
    with pytest.raises(InputError, match='begun with another chat_template'):
        prompts_of(folder, *records)


def test_the_command_names_the_lines_that_the_template_refuses(prompts_of, folder, monkeypatch):
    records = {'messages': MESSAGES}, {'prompt': 'a'}, {'messages': SYSTEM}
    with pytest.raises(InputError, match=r'lines 3 cannot be rendered.*no system turns'):
        prompts_of(folder, *records)
    assert not (folder.parent / 'out.jsonl').exists()
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    with pytest.raises(InputError, match="need the extra 'chat'"):
        prompts_of(folder, *records)


def test_the_server_reads_what_the_template_writes(folder):
    config = EngineConfig(max_rows=1, max_length=48)
    model = loaded(folder)
    chat = chat_prompts(model)
    body = {'model': 'tiny', 'messages': MESSAGES}
    asked = read_chat(body, model.tokenizer, config, chat)
    (request,) = asked.requests
    assert (request.prompt, request.stop_ids, asked.stops) == (IDS, ENDS, ())
    worker: Any = types.SimpleNamespace(healthy=True, config=config)
    client = TestClient(App(worker, model.tokenizer, 'tiny', None, chat).application())
    broken = {'role': 'user', 'content': '\ud800'}
    for messages, message in ((SYSTEM, 'no system turns'), ([broken], 'surrogate')):
        content = json.dumps(body | {'messages': messages})
        answer = client.post('/v1/chat/completions', content=content)
        assert answer.status_code == 400
        assert answer.json()['error']['param'] == 'messages'
        assert message in answer.json()['error']['message']


def test_without_a_template_conversations_are_text_as_in_training(plain):
    model = loaded(plain)
    assert chat_prompts(model) is None
    body = {'model': 'tiny', 'messages': MESSAGES}
    asked = read_chat(body, model.tokenizer, EngineConfig(max_rows=1, max_length=48))
    text = 'user: ü <b>\n\nassistant:'
    assert asked.requests[0].prompt == (BYTES.bos_id, *text.encode())
    assert asked.stops == (NEXT_TURN,)
