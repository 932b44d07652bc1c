"""The server, asked by OpenAI's own client: right answers, alone and together; clear refusals."""

import concurrent.futures
import http.client
import json
import logging
import re
import threading
import time

import httpx
import jax
import numpy as np
import openai
import pytest
import uvicorn
from stage import make_stage

from experiments.loading import load_stage
from experiments.serve_app import MAX_BODY, App
from experiments.serve_worker import Worker
from moe.engine import Engine
from moe.requests import EngineConfig

KEY = 'a key that no log may show'
CONFIG = EngineConfig(max_rows=3, max_length=400, chunk=16, max_waiting=8, max_top=5)


class Served:
    """A server on a free port of this machine."""

    def __init__(self, folder):
        self.loaded = load_stage(make_stage(folder))
        vocab_size = self.loaded.tokenizer.vocab_size
        self.engine = Engine(
            self.loaded.model, self.loaded.variables, CONFIG, vocab_size=vocab_size
        )
        self.worker = Worker(self.engine, vocab_size)
        app = App(self.worker, self.loaded.tokenizer, 'tiny', KEY).application()
        settings = uvicorn.Config(app, port=0, log_level='warning', access_log=False)
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f'http://127.0.0.1:{port}'
        self.client = openai.OpenAI(
            api_key=KEY, base_url=f'{self.url}/v1', max_retries=0, timeout=300
        )

    def metric(self, name: str) -> int:
        text = self.post('/metrics', method='GET').text
        lines = dict(line.split() for line in text.splitlines() if not line.startswith('#'))
        return int(lines[f'fractional_{name}'])

    def post(self, path: str, method='POST', key=KEY, **kwargs) -> httpx.Response:
        headers = {'Authorization': f'Bearer {key}'}
        return httpx.request(method, self.url + path, headers=headers, timeout=300, **kwargs)

    def close(self):
        self.server.should_exit = True
        self.thread.join(30)
        self.worker.close()


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it never came true'
        time.sleep(0.02)


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp('study'))
    yield served
    served.close()


def greedy(loaded, ids, count):
    """The likeliest of the tokenizer's ids, one full forward a token, up to the end of the text."""
    forward, tokens, log_probs = jax.jit(loaded.model.apply), [], []
    for _ in range(count):
        text = np.zeros((1, 32), int)
        text[0, : len(ids) + len(tokens)] = [*ids, *tokens]
        logits = forward(loaded.variables, text).logits[0, len(ids) + len(tokens) - 1]
        token = int(logits[: loaded.tokenizer.vocab_size].argmax())
        if token == loaded.tokenizer.eos_id:
            break
        tokens.append(token)
        log_probs.append(float(jax.nn.log_softmax(logits)[token]))
    return tokens, log_probs


def test_a_completion_is_what_the_model_writes(served):
    tokenizer = served.loaded.tokenizer
    answer = served.client.completions.create(
        model='tiny', prompt='the cat', max_tokens=12, temperature=0, logprobs=2
    )
    tokens, log_probs = greedy(served.loaded, [tokenizer.bos_id, *b'the cat'], 12)
    (choice,) = answer.choices
    assert choice.text == tokenizer.decode(tokens)
    assert choice.finish_reason == ('length' if len(tokens) == 12 else 'stop')
    np.testing.assert_allclose(choice.logprobs.token_logprobs, log_probs, atol=2e-4)
    assert {len(top) for top in choice.logprobs.top_logprobs} == {2}
    assert answer.usage.prompt_tokens == 8
    assert answer.usage.completion_tokens == min(12, len(tokens) + 1)


def test_given_tokens_are_scored_by_the_full_forward(served):
    ids = [served.loaded.tokenizer.bos_id, *b'on a mat', 0xC3, 0xBC]
    answer = served.client.completions.create(
        model='tiny',
        prompt=[ids, ids[:4]],
        max_tokens=0,
        echo=True,
        logprobs=1,
        extra_body={'return_tokens_as_token_ids': True},
    )
    logits = jax.jit(served.loaded.model.apply)(served.loaded.variables, np.array([ids])).logits[0]
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
    for choice, length in zip(answer.choices, (len(ids), 4), strict=True):
        scores = choice.logprobs
        assert scores.tokens == [f'token_id:{id_}' for id_ in ids[:length]]
        assert scores.token_logprobs[0] is None
        np.testing.assert_allclose(scores.token_logprobs[1:], expected[: length - 1], atol=2e-4)
    assert answer.choices[0].text == 'on a matü'
    assert answer.choices[0].logprobs.text_offset == [0, *range(8), 8, 8]


def test_a_stream_says_what_the_whole_answer_says(served):
    how = {
        'model': 'tiny',
        'messages': [{'role': 'user', 'content': 'sat'}],
        'max_tokens': 20,
        'seed': 5,
        'n': 2,
        'logprobs': True,
        'top_logprobs': 2,
    }
    whole = served.client.chat.completions.create(**how)
    options = {'include_usage': True}
    parts = list(served.client.chat.completions.create(**how, stream=True, stream_options=options))
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert parts[-1].usage == whole.usage
    for index, choice in enumerate(whole.choices):
        own = [c for part in parts for c in part.choices if c.index == index]
        text = ''.join(c.delta.content or '' for c in own)
        assert text == choice.message.content
        assert own[0].delta.role == 'assistant'
        assert own[-1].finish_reason == choice.finish_reason
        streamed = [token for c in own for token in c.logprobs.content]
        assert [t.token for t in streamed] == [t.token for t in choice.logprobs.content]
        np.testing.assert_allclose(
            [t.logprob for t in streamed], [t.logprob for t in choice.logprobs.content], atol=2e-4
        )
        assert all(len(t.top_logprobs) == 2 for t in streamed)


def test_a_stop_string_ends_the_text_before_it(served):
    how = {'model': 'tiny', 'prompt': 'a', 'max_tokens': 40, 'temperature': 0}
    text = served.client.completions.create(**how).choices[0].text
    stop = text[len(text) // 2 :][:2]
    answer = served.client.completions.create(**how, stop=['never there', stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == 'stop'
    wait_until(lambda: served.metric('requests_under_way') == 0)


def test_under_load_every_answer_is_what_it_is_alone(served):
    def ask(seed):
        answer = served.client.completions.create(
            model='tiny', prompt='x' * (1 + 5 * seed), max_tokens=6 + seed, seed=seed
        )
        return answer.choices[0].text

    alone = [ask(seed) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone
    assert served.metric('requests_under_way') == 0


def test_a_dropped_connection_frees_its_rows(served, monkeypatch):
    # No row may be done before it is dropped: the likeliest text of 'a' goes on to its limit, and
    # an engine that rests takes seconds to get there on any machine.
    step = served.engine.step
    monkeypatch.setattr(served.engine, 'step', lambda: (time.sleep(0.02), step())[1])
    how = {'model': 'tiny', 'prompt': 'a', 'max_tokens': 390, 'temperature': 0}
    cancelled = served.metric('cancelled_total')
    stream = served.client.completions.create(**how, n=2, stream=True)
    next(iter(stream))
    assert served.metric('requests_under_way') == 2
    assert 1 <= served.metric('cache_pages_in_use') <= served.metric('cache_pages')
    stream.close()
    wait_until(lambda: served.metric('cancelled_total') == cancelled + 2)
    wait_until(lambda: served.metric('cache_pages') == 0)
    assert served.metric('requests_under_way') == 0
    # One who hangs up while nothing has been answered yet.
    connection = http.client.HTTPConnection(served.url.removeprefix('http://'))
    headers = {'Authorization': f'Bearer {KEY}', 'Content-Type': 'application/json'}
    connection.request('POST', '/v1/completions', json.dumps(how | {'n': 3}), headers)
    wait_until(lambda: served.metric('requests_under_way') == 3)
    connection.close()
    wait_until(lambda: served.metric('cancelled_total') == cancelled + 5)
    assert served.metric('requests_under_way') == 0


@pytest.mark.parametrize(
    ('change', 'param', 'message'),
    [
        ({'prompt': 'x' * 400}, 'max_tokens', '400 at most'),
        ({'prompt': 3}, 'prompt', 'a text, ids'),
        ({'prompt': []}, 'prompt', 'one or more ids'),
        ({'prompt': [999]}, None, r'ids in \[0, 259\)'),
        ({'prompt': [[1], 'x', {}]}, 'prompt', 'prompt must be'),
        ({'max_tokens': -1}, 'max_tokens', 'a count of tokens'),
        ({'max_tokens': 0}, 'max_tokens', 'at least 1'),
        ({'temperature': 3}, 'temperature', 'from 0 to 2'),
        ({'temperature': 'hot'}, 'temperature', 'from 0 to 2'),
        ({'logprobs': 6}, 'logprobs', 'At most 5'),
        ({'stop': ['a'] * 5}, 'stop', 'up to 4'),
        ({'frequency_penalty': 0.5}, 'frequency_penalty', 'not supported'),
        ({'surprise': 1}, 'surprise', 'not supported'),
        ({'stream_options': {'include_usage': True}}, 'stream_options', 'needs stream'),
        ({'prompt': None}, 'prompt', 'required'),
    ],
)
def test_what_is_malformed_is_named(served, change, param, message):
    body = {'model': 'tiny', 'prompt': 'a', 'max_tokens': 4} | change
    answer = served.post('/v1/completions', json=body)
    assert answer.status_code == 400
    error = answer.json()['error']
    assert error['type'] == 'invalid_request_error'
    assert error['param'] == param
    assert re.search(message, error['message'])


def test_refusals_are_errors_that_the_client_knows(served):
    ask = served.client.completions.create
    good = {'model': 'tiny', 'prompt': 'a', 'max_tokens': 100}
    with pytest.raises(openai.NotFoundError, match='no model'):
        ask(**(good | {'model': 'other'}))
    with pytest.raises(openai.RateLimitError, match='at most 11 may be'):
        ask(**good, n=12)
    with pytest.raises(openai.AuthenticationError, match='valid key'):
        served.client.with_options(api_key='wrong').models.list()
    with pytest.raises(openai.BadRequestError, match='message 0 must have a role'):
        served.client.chat.completions.create(model='tiny', messages=[{'content': 'x'}])
    assert served.post('/v1/completions', content=b'{"model": ').status_code == 400
    assert served.post('/v1/completions', content=b'[' * 100_000).status_code == 400
    large = served.post('/v1/completions', content=b' ' * (MAX_BODY + 1))
    assert large.status_code == 413
    assert large.json()['error']['code'] == 'body_too_large'
    assert served.post('/v1/nothing').json()['error']['code'] == 'unknown_url'
    assert served.post('/v1/completions', method='GET').status_code == 405


def test_models_health_and_metrics_are_told_and_the_key_is_not(served, caplog):
    caplog.set_level(logging.DEBUG)
    assert [model.id for model in served.client.models.list()] == ['tiny']
    assert served.client.models.retrieve('tiny').id == 'tiny'
    assert httpx.get(f'{served.url}/health').json() == {'status': 'ok'}
    assert httpx.get(f'{served.url}/metrics').status_code == 401
    before = served.metric('generated_tokens_total')
    served.client.completions.create(model='tiny', prompt='a', max_tokens=3, seed=1)
    assert 0 < served.metric('generated_tokens_total') - before <= 3
    said = [record.getMessage() for record in caplog.records if 'http' not in record.name]
    assert not any(KEY in line for line in said)


def test_an_engine_that_fails_is_told_and_refuses(tmp_path, monkeypatch):
    served = Served(tmp_path)
    try:
        monkeypatch.setattr(served.worker._engine, 'step', lambda: 1 / 0)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match='engine has failed'):
                served.client.completions.create(model='tiny', prompt='a')
        assert httpx.get(f'{served.url}/health').status_code == 503
        with pytest.raises(openai.APIError, match='engine has failed'):
            list(served.client.completions.create(model='tiny', prompt='a', stream=True))
    finally:
        served.close()
    assert served.worker.counters.requests == 1
