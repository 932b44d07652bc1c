"""A server that is not ours: `transformers serve` with a random model, asked for texts."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

torch = pytest.importorskip('torch', reason='the server needs the extra hf-test')
transformers = pytest.importorskip('transformers', reason='the server needs the extra hf-test')
pytest.importorskip('fastapi', reason='the server needs the extra hf-test')

from faulty_proxy import FaultyProxy  # noqa: E402

from distill.answer_ledger import AnswerLedger  # noqa: E402
from distill.asking import Manner, ask_all  # noqa: E402
from distill.backoff import Backoff  # noqa: E402
from distill.pretrained_tokenizer import write_pretrained  # noqa: E402
from distill.remote import RemoteServer, Request  # noqa: E402
from distill.remote_targets import score_reader, score_request  # noqa: E402
from distill.token_names import TokenNames  # noqa: E402
from distill.tokenizer import ByteTokenizer  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
MANNER = Manner(2, Backoff(3, 0.05, 0.1))


def make_model(folder: pathlib.Path) -> None:
    """Saves a random Llama over bytes."""
    tokenizer = ByteTokenizer()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / 'weights')
    write_pretrained(tokenizer, folder / 'model')
    for file in (folder / 'weights').iterdir():
        file.rename(folder / 'model' / file.name)
    settings = folder / 'model' / 'tokenizer_config.json'
    values = json.loads(settings.read_text()) | {'chat_template': TEMPLATE}
    settings.write_text(json.dumps(values))


def wait_for(port: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        assert process.poll() is None, 'the server has ended'
        try:
            with urllib.request.urlopen(f'http://localhost:{port}/health', timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError('the server does not answer')


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp('served')
    make_model(folder)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    program = pathlib.Path(sys.executable).with_name('transformers')
    model = str(folder / 'model')
    flags = ('--host', '127.0.0.1', '--port', str(port), '--device', 'cpu')
    process = subprocess.Popen(
        [str(program), 'serve', model, *flags],
        env=os.environ | {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'},
    )
    wait_for(port, process)
    yield f'127.0.0.1:{port}', model
    process.kill()
    process.wait()


def test_writes_texts_through_faults_and_has_no_log_probabilities(served, tmp_path):
    upstream, model = served
    proxy = FaultyProxy(upstream)
    server = RemoteServer(proxy.url, model, None, 60.0)
    messages = [[{'role': 'user', 'content': f'{n}'}] for n in range(3)]
    bodies = [{'messages': m, 'max_tokens': 5, 'temperature': 0.7, 'seed': 1} for m in messages]
    chats = [Request('chat/completions', body, 200, 5) for body in bodies]
    plain = Request('completions', {'prompt': 'the', 'max_tokens': 5, 'seed': 1}, 20, 5)
    for number, fault in enumerate(('500', 'lost')):
        proxy.faults[json.dumps(messages[number])] = [fault]

    def text(request, answer):
        (choice,) = answer['choices']
        return choice['message']['content'] if 'message' in choice else choice['text']

    with AnswerLedger(tmp_path / 'texts.jsonl', {}) as ledger:
        tally = ask_all(server, [*chats, plain], ledger, text, MANNER)
        assert (tally.answered, tally.quarantined) == (4, 0)
        assert all(ledger.entry(one.key)['record'] for one in [*chats, plain])
        # bos and three bytes, five ids.
        assert ledger.entry(plain.key)['cost'][0] == 9
    # A server that leaves out what it does not know is noticed, not guessed at.
    tokenizer = ByteTokenizer()
    score = score_request((tokenizer.bos_id, *b'the'), 'echo', 2, as_ids=False)
    body = {**score.body, 'prompt': 'the', 'max_tokens': 1}
    score = Request('completions', body, 4, 1)
    read = score_reader('echo', 2, TokenNames(tokenizer))
    with AnswerLedger(tmp_path / 'scores.jsonl', {}) as ledger:
        ask_all(server, [score], ledger, read, MANNER)
        assert ledger.outcome(score.key) == 'quarantined'
        assert "'logprobs' is missing" in ledger.entry(score.key)['reason']
    proxy.close()
