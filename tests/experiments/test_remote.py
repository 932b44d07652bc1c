"""A remote teacher: a real server in a process of its own, and a proxy that fails before it."""

import http.client
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
import tiny_remote
from faulty_proxy import FaultyProxy
from stage import CONFIG, make_stage

from distill.cache import CachedTargets, read_manifest
from distill.checkpoint import read_metadata
from distill.remote_targets import pieces_of
from distill.sources import read_documents
from distill.tokenizer import ByteTokenizer
from experiments.context import Context
from experiments.loading import load_stage
from experiments.stages import run_stages
from experiments.study import build_study
from experiments.workdir import read_json
from moe.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
KEY = 'sk-tiny-key-that-no-file-may-hold'
K = 4
TOKENIZER = ByteTokenizer()
QUESTIONS = [
    {'messages': [{'role': 'user', 'content': f'what is {n}?'}], 'id': n} for n in range(9)
]


def in_words(params):
    """Makes a model that all but always writes ASCII: its bytes score high, all other ids 0."""
    scale = np.where(np.arange(CONFIG.vocab_size) < 128, 3.0, 0.0)
    return params | {'head': {'kernel': params['head']['kernel'] * scale}}


class Server:
    """`experiments.serve` in a process of its own."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.stage = make_stage(folder, in_words)
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            self.port = probe.getsockname()[1]
        flags = ('--name=tiny', '--rows=3', '--max_length=256', f'--port={self.port}')
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'experiments.serve', f'--checkpoint={self.stage}', *flags],
            cwd=ROOT,
            env=os.environ | {'FRACTIONAL_API_KEY': KEY, 'JAX_NUM_CPU_DEVICES': '1'},
        )

    def wait(self) -> None:
        end = time.monotonic() + 240
        while time.monotonic() < end:
            assert self.process.poll() is None
            try:
                connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=5)
                connection.request('GET', '/health')
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError('the server does not answer')


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp('served'))
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def proxy(server, monkeypatch):
    monkeypatch.setenv('TINY_KEY', KEY)
    server.wait()
    proxy = FaultyProxy(f'127.0.0.1:{server.port}')
    yield proxy
    proxy.close()


def study(proxy, **remote):
    config = tiny_remote.get_config()
    config.teacher.remote.update(base_url=proxy.url, **remote)
    return config


def context(config, workdir):
    stop = types.SimpleNamespace(agreed=lambda step: False)
    return Context(config, str(workdir), command='test', stop=stop)


def files_with(text, folder):
    return [p for p in folder.rglob('*') if p.is_file() and text.encode() in p.read_bytes()]


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, 'it never came true'
        time.sleep(0.05)


class Command:
    """`python -m experiments.remote`, in a process of its own."""

    def __init__(self, proxy, folder, prompts, *flags):
        file = folder / 'prompts.jsonl'
        file.write_text('\n'.join(map(json.dumps, prompts)))
        settings = ('max_new_tokens=8', 'keep_cut=True', f'base_url={proxy.url}')
        self.workdir = folder / 'study'
        self.argv = [
            *(sys.executable, '-m', 'experiments.remote'),
            '--config=tests/experiments/tiny_remote.py',
            f'--workdir={self.workdir}',
            f'--prompts={file}',
            *(f'--config.teacher.remote.{setting}' for setting in settings),
            *flags,
        ]

    def start(self):
        path = os.pathsep.join([str(ROOT), str(ROOT / 'tests' / 'experiments')])
        return subprocess.Popen(
            self.argv,
            cwd=ROOT,
            env=os.environ | {'PYTHONPATH': path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ledger(self):
        lines = (self.workdir / 'remote' / 'ledger.jsonl').read_text().splitlines()
        return [json.loads(line) for line in lines]

    def finals(self):
        return sum(line.get('as') in ('answered', 'quarantined') for line in self.ledger())

    def texts(self):
        lines = (self.workdir / 'remote' / 'texts.jsonl').read_text().splitlines()
        return [json.loads(line) for line in lines]


def test_killed_and_started_again_every_prompt_is_answered_once(proxy, tmp_path):
    """Whatever fails on the way: too many requests, a server that breaks, lines that are cut."""
    proxy.remembers = True
    for number, fault in enumerate(('429', '500', 'reset', 'lost')):
        proxy.faults[json.dumps(QUESTIONS[number]['messages'])] = [fault]
    proxy.faults[json.dumps(QUESTIONS[4]['messages'])] = ['truncated'] * 2
    held, go = threading.Event(), threading.Event()

    def hold(key):
        if sum(proxy.answered.values()) >= 3:
            held.set()
            go.wait(60)

    proxy.before_answer = hold
    command = Command(proxy, tmp_path, QUESTIONS)
    first = command.start()
    assert held.wait(120), first.communicate()
    wait_until(lambda: command.finals() == sum(proxy.answered.values()))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = command.ledger()
    ended = {line['ended'] for line in before if line.get('as') in ('answered', 'quarantined')}
    under_way = set()
    for line in before[1:]:
        under_way ^= {line.get('asked') or line['ended']}
    assert len(ended) >= 3
    assert under_way
    # As if the kill had come in the middle of a line.
    with (command.workdir / 'remote' / 'ledger.jsonl').open('a') as file:
        file.write('{"asked": "12')
    asked_before = {key: len(bodies) for key, bodies in proxy.asked.items()}
    proxy.before_answer = lambda key: None
    go.set()
    again = command.start()
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output
    assert f'{len(under_way)} of them were under way' in output
    finals = [line for line in command.ledger() if line.get('as') in ('answered', 'quarantined')]
    assert sorted(line['ended'] for line in finals) == sorted(proxy.asked)
    assert len(finals) == len(QUESTIONS)
    # The server was asked once for each, and nothing that had ended was sent again.
    assert set(proxy.passed.values()) == {1}
    assert all(len(proxy.asked[key]) == asked_before[key] for key in ended)
    (quarantined,) = (line for line in finals if line['as'] == 'quarantined')
    assert 'no JSON' in quarantined['reason']
    texts = command.texts()
    assert [row['id'] for row in texts] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert files_with(KEY, tmp_path) == []
    assert KEY not in output


def test_texts_are_data_with_a_licence_and_a_teacher(proxy, tmp_path):
    prompts = [{'prompt': 'the cat', 'id': 'a'}, {'prompt': 'the cat'}]
    command = Command(proxy, tmp_path, prompts, f'--json={tmp_path / "rows.json"}')
    run = command.start()
    output = run.communicate(timeout=240)[0]
    assert run.returncode == 0, output
    one, two = command.texts()
    assert one['id'] == 'a'
    assert one['text'].startswith('the cat')
    assert one['key'] != two['key']  # the same prompt twice is two texts
    assert one['licence'] == 'Apache-2.0'
    assert one['teacher']['permits_training'] is True
    documents = read_documents(str(command.workdir / 'remote' / 'texts.jsonl'))
    assert [document.text for document in documents] == [one['text'], two['text']]
    rows = {row['name']: row['value'] for row in json.loads((tmp_path / 'rows.json').read_text())}
    assert rows['remote/texts'] == 2
    # bos and 7 bytes, 8 written at most.
    assert 2 * 9 <= rows['remote/tokens'] <= 2 * 16
    assert 'remote/dollars' not in rows  # no price was given


class Reference:
    """What the served model says, by full forwards in this process."""

    def __init__(self, stage):
        loaded = load_stage(stage)
        self._variables = loaded.variables
        self._apply = jax.jit(loaded.model.apply)

    def log_probs(self, ids):
        """Of the id after each of these."""
        text = np.zeros((1, 128), int)
        text[0, : len(ids)] = ids
        logits = self._apply(self._variables, text).logits[0, : len(ids)]
        return np.asarray(jax.nn.log_softmax(logits))[:, : TOKENIZER.vocab_size]


@pytest.fixture(scope='module')
def reference(server):
    return Reference(server.stage)


def assert_is_top(said, row, place, log_probs):
    """The stored ids are the likeliest, with their probabilities; the rest is in the tail."""
    ids, kept = said.ids[row, place], np.exp(said.log_probs[row, place])
    expected = np.exp(log_probs)
    np.testing.assert_allclose(kept, expected[ids], rtol=0.01, atol=1e-6)
    np.testing.assert_allclose(kept, np.sort(expected)[::-1][:K], rtol=0.01, atol=1e-6)
    tail = np.exp(said.tail_log_prob[row, place])
    np.testing.assert_allclose(tail, 1 - kept.sum(), rtol=0.01, atol=1e-5)


def text_file(folder):
    generator = random.Random(0)
    file = folder / 'text.jsonl'
    words = ('the', 'cat', 'naïve', 'on', 'a', 'mat', '日本')
    texts = [' '.join(generator.choices(words, k=9)) for _ in range(12)]
    file.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    return file


def test_a_student_learns_from_log_probabilities_of_its_own_batches(proxy, reference, tmp_path):
    """Scored by the server, piece by piece; one piece comes back as other tokens."""
    config = study(proxy)
    config.data.source = str(text_file(tmp_path))
    ours = context(config, tmp_path / 'study')
    pipeline = ours.pipeline()
    batches = [next(pipeline) for _ in range(2)]

    def shifted(answer):
        scores = answer['choices'][0]['logprobs']
        scores['tokens'] = scores['tokens'][1:] + scores['tokens'][:1]
        return answer

    pieces = [piece for batch in batches for piece in pieces_of(batch, range(8))]
    odd = pieces[3]
    proxy.faults[json.dumps(list(odd.ids))] = [shifted]
    proxy.faults[json.dumps(list(pieces[5].ids))] = ['lost']
    run_stages(ours, ('teacher', 'targets'))
    written = CachedTargets(tmp_path / 'study' / 'targets', {})
    for number, batch in enumerate(batches):
        said = written.read(batch)
        for piece in pieces_of(batch, range(8)):
            silent = piece.ids == odd.ids
            log_probs = reference.log_probs(piece.ids)
            for place in range(piece.predicted):
                at = piece.start + place
                if silent:
                    assert np.isneginf(said.log_probs[piece.row, at]).all()
                elif number == 0 or place == piece.predicted - 1:
                    assert_is_top(said, piece.row, at, log_probs[place])
    result = read_json(tmp_path / 'study' / 'targets' / 'result.json')
    positions = sum(piece.predicted for piece in pieces)
    assert result['silent_share'] == pytest.approx(odd.predicted / positions)
    teacher = read_manifest(tmp_path / 'study' / 'targets')['teacher']
    assert teacher['provenance'] == {
        'name': 'tiny',
        'version': '1',
        'licence': 'Apache-2.0',
        'permits_training': True,
    }
    lines = (tmp_path / 'study' / 'targets' / 'ledger.jsonl').read_text().splitlines()
    (quarantined,) = (line for line in lines if '"quarantined"' in line)
    assert 'misaligned at token 0' in quarantined
    # Nothing is asked again, by this study or the same one after a kill before it was complete.
    asked = len(proxy.asked)
    (tmp_path / 'study' / 'targets' / 'result.json').unlink()
    run_stages(context(config, tmp_path / 'study'), ('targets',))
    assert len(proxy.asked) == asked
    run_stages(ours, ('student',))
    identity = read_metadata(tmp_path / 'study' / 'student' / 'model').metadata['identity']
    assert identity['teacher'] == teacher
    assert files_with(KEY, tmp_path) == []


def test_what_came_with_the_texts_are_targets_of_them(proxy, reference, tmp_path):
    """Own tokens: aligned by bytes, though rows cut the texts anywhere."""
    prompts = [{'prompt': f'the {word} is'} for word in ('cat', 'dog', 'mat', 'sun', 'sea', 'sky')]
    settings = {'max_new_tokens': 20, 'top_log_probs': 5, 'temperature': 0.2, 'keep_cut': True}
    flags = [f'--config.teacher.remote.{name}={value}' for name, value in settings.items()]
    command = Command(proxy, tmp_path, prompts, *flags)
    run = command.start()
    output = run.communicate(timeout=240)[0]
    assert run.returncode == 0, output
    assert len(command.texts()) >= 5
    config = study(proxy, scoring='written', **settings)
    config.data.source = str(command.workdir / 'remote' / 'texts.jsonl')
    ours = context(config, tmp_path / 'other')
    asked = len(proxy.asked)
    run_stages(ours, ('teacher', 'targets'))
    assert len(proxy.asked) == asked
    written = CachedTargets(tmp_path / 'other' / 'targets', {})
    documents = [document.text for document in ours.documents.split[0]]
    pipeline, found = ours.pipeline(), 0
    for _ in range(2):
        batch = next(pipeline)
        said = written.read(batch)
        for piece in pieces_of(batch, range(8)):
            # The text that this is a part of, and where: the prompts differ in their fifth byte.
            spelt = bytes(index for index in piece.ids if index < 256).decode()
            wholes = [text for text in documents if spelt in text]
            if len(wholes) != 1:
                continue
            ids = [TOKENIZER.bos_id, *wholes[0].encode(), TOKENIZER.eos_id]
            length = len(piece.ids)
            firsts = [at for at in range(len(ids)) if tuple(ids[at : at + length]) == piece.ids]
            if len(firsts) != 1:
                continue
            first = firsts[0]
            log_probs = reference.log_probs(ids)
            for place in range(piece.predicted):
                if first + place < len('the cat is') or first + place == len(ids) - 2:
                    # The prompt, and the end that a text which was cut off did not have.
                    assert np.isneginf(said.log_probs[piece.row, piece.start + place]).all()
                else:
                    assert_is_top(said, piece.row, piece.start + place, log_probs[first + place])
                    found += 1
    assert found > 50
    learn_from_the_text_alone(config, tmp_path / 'text')


def learn_from_the_text_alone(config, workdir):
    """By sequences: a study without a teacher to run, targets to write or a control to compare."""
    config.targets.update(kind='text', cached=False)
    config.student.terms.kl.weight = 0.0
    with pytest.raises(InputError, match='which the student learns by cross_entropy alone'):
        build_study(config)
    with config.unlocked():
        del config.student.terms['kl']
    stages = ('teacher', 'targets', 'student', 'control', 'evaluate', 'report')
    run_stages(context(config, workdir), stages)
    assert not (workdir / 'control').exists()
    summary = read_json(workdir / 'summary.json')
    assert set(summary['models']) == {'student'}
    assert summary['provenance']['teacher']['name'] == 'tiny'
    assert summary['comparison'] == {}
    config.teacher.provenance.version = '2'
    with pytest.raises(InputError, match=r"texts.jsonl, line 1: .* 'version': '1'"):
        run_stages(context(config, workdir.with_name('another')), ('teacher',))


def test_a_teacher_that_is_not_declared_is_refused_by_name(proxy, tmp_path):
    for name in ('name', 'version', 'licence', 'permits_training'):
        config = study(proxy)
        config.teacher.provenance[name] = None
        with pytest.raises(InputError, match=rf"remote teacher 'tiny' at .*; {name} missing"):
            build_study(config)
    config = study(proxy)
    config.teacher.provenance.permits_training = False
    with pytest.raises(InputError, match='terms forbid training on its outputs'):
        build_study(config)
    assert not proxy.asked


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'teacher.remote.base_url': None}, 'base_url is required'),
        ({'teacher.remote.model': None}, 'model is required'),
        ({'teacher.remote.api_key_variable': 'sk-0123'}, 'not the key itself'),
        ({'teacher.remote.max_dollars': 1.0}, 'needs the prices'),
        ({'teacher.checkpoint': 'folder'}, 'config.teacher.checkpoint'),
        ({'targets.cached': False}, "received kind='top_k', cached=False"),
        ({'targets.temperature': 2.0}, 'temperature=1.0'),
        ({'student.init.method': 'upcycle'}, 'does not give'),
        ({'student.terms.kl.name': 'hinge', 'student.terms.kl.k': 2}, 'hinge orders'),
    ],
)
def test_what_a_server_cannot_give_is_refused(change, message):
    config = tiny_remote.get_config()
    config.teacher.remote.base_url = 'https://host/v1'
    for key, value in change.items():
        *path, name = key.split('.')
        part = config
        for step in path:
            part = part[step]
        with part.unlocked():
            part[name] = value
    with pytest.raises(InputError, match=message) as error:
        build_study(config)
    assert 'sk-0123' not in str(error.value)


def test_a_key_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv('TINY_KEY', raising=False)
    config = tiny_remote.get_config()
    config.teacher.remote.base_url = 'https://host/v1'
    config.data.source = str(text_file(tmp_path))
    with pytest.raises(InputError, match='The environment variable TINY_KEY must hold the key'):
        run_stages(context(config, tmp_path / 'study'), ('teacher',))
    monkeypatch.setenv('TINY_KEY', 'sk-end-of\nline')
    with pytest.raises(InputError, match='without spaces') as error:
        build_study(config).teacher.remote.server()
    assert 'sk-end' not in str(error.value)
