"""Bulk generation: each prompt once, whatever happens; what is broken is named before it starts."""

import json
import signal

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from stage import CONFIG, make_stage

import moe
from distill.pretrained_tokenizer import write_pretrained
from distill.tokenizer import ByteTokenizer
from experiments import generate
from experiments.bulk import read_prompts
from experiments.loading import load_stage
from experiments.text_stream import TextStream
from moe.config import AttentionConfig, TransformerConfig
from moe.decode import write
from moe.errors import InputError
from moe.sampling import Sampling
from moe.transformer import Transformer
from moe.unstacked import unrolled

PROMPTS = [
    {'prompt': 'the cat', 'id': 'a'},
    {'prompt': ''},
    {'messages': [{'role': 'user', 'content': 'sat'}], 'id': 7},
    {'prompt': 'on a mat and \u00fc'},
    {'prompt': 'the dog'},
]


@pytest.fixture(scope='module')
def stage(tmp_path_factory):
    return make_stage(tmp_path_factory.mktemp('study'))


@pytest.fixture
def run(stage, tmp_path):
    """Runs the command on the prompts."""
    prompts = tmp_path / 'in.jsonl'
    prompts.write_text('\n'.join(map(json.dumps, PROMPTS)) + '\n\n')
    handler = signal.getsignal(signal.SIGTERM)
    generate.flags.FLAGS.mark_as_parsed()

    def run(out='out.jsonl', **settings):
        defaults = {
            'checkpoint': str(stage),
            'prompts': str(prompts),
            'out': out and str(tmp_path / out),
            'max_new_tokens': 9,
            'rows': 2,
            'max_length': 64,
        }
        with flagsaver.flagsaver(**(defaults | settings)):
            generate.main()
        return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]

    yield run
    signal.signal(signal.SIGTERM, handler)


def test_every_prompt_gets_the_text_that_the_model_writes(run, stage):
    records = {record['line']: record for record in run()}
    assert sorted(records) == [1, 2, 3, 4, 5]
    assert records[1]['id'] == 'a'
    assert 'id' not in records[2]
    tokenizer, loaded = ByteTokenizer(), load_stage(stage)
    assert loaded.model.config == unrolled(CONFIG)
    texts = {1: 'the cat', 2: '', 3: 'user: sat\n\n', 4: 'on a mat and ü', 5: 'the dog'}
    ids = [[tokenizer.bos_id, *tokenizer.encode(texts[line])] for line in sorted(texts)]
    keys = jax.vmap(jax.random.key)(np.arange(1, 6))
    written = write(
        loaded.model, loaded.variables, ids, max_new_tokens=9, sampling=Sampling(), key=keys
    )
    for row, line in enumerate(sorted(texts)):
        # Ids past the tokenizer's are never written; where the model alone drew none, all agree.
        alone = np.asarray(written.tokens[row]).tolist()
        if max(alone) < tokenizer.vocab_size and tokenizer.eos_id not in alone:
            assert records[line]['tokens'] == alone
            np.testing.assert_allclose(
                records[line]['log_probs'], written.log_probs[row], atol=2e-4
            )
        assert max(records[line]['tokens']) < tokenizer.vocab_size
        assert records[line]['text'] == tokenizer.decode(records[line]['tokens'])


def test_a_published_folder_writes_what_its_model_does(tmp_path, run):
    config = TransformerConfig(264, 1, 8, 8, AttentionConfig(2, 2, 4, 'head'))
    variables = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), np.ones((1, 1), int)))
    write_pretrained(ByteTokenizer(), tmp_path / 'tokenizer')
    folder = tmp_path / 'tiny-qwen'
    moe.save_pretrained(folder, config, variables, tokenizer=tmp_path / 'tokenizer', card='tiny')
    settings = {'checkpoint': str(folder), 'temperature': 0.0, 'dtype': 'float32'}
    records = {record['line']: record for record in run(**settings)}
    tokens = records[4]['tokens']
    tokenizer = ByteTokenizer()
    prompt = [tokenizer.bos_id, *tokenizer.encode(PROMPTS[3]['prompt'])]
    logits = Transformer(config).apply(variables, np.array([prompt + tokens])).logits[0]
    real = np.asarray(logits)[len(prompt) - 1 : -1, : tokenizer.vocab_size]
    chosen = real[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(chosen, real.max(axis=-1), atol=1e-4)


def test_a_run_that_was_killed_goes_on_where_it_was(run, tmp_path):
    whole = {record['line']: record for record in run('whole.jsonl')}
    run('cut.jsonl')
    cut = tmp_path / 'cut.jsonl'
    lines = cut.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b''.join(lines[:2]) + lines[2][:-5])  # in the midst of the third line
    resumed = run('cut.jsonl')
    assert cut.read_bytes().startswith(b''.join(lines[:2]))
    assert sorted(record['line'] for record in resumed) == [1, 2, 3, 4, 5]
    assert {record['line']: record for record in resumed} == whole


def test_other_settings_prompts_or_files_are_refused(run, tmp_path):
    run()
    with pytest.raises(InputError, match='begun with another max_new_tokens, temperature'):
        run(max_new_tokens=5, temperature=0.5)
    (tmp_path / 'other.jsonl').write_text('{"prompt": "x"}\n')
    with pytest.raises(InputError, match='begun with another model'):
        run(weights='int4_experts')
    with pytest.raises(InputError, match='begun with another prompts'):
        run(prompts=str(tmp_path / 'other.jsonl'))
    with pytest.raises(InputError, match='was not written by this command'):
        run(out='other.jsonl')
    with pytest.raises(InputError, match='lines 4 are longer'):
        run(out='new.jsonl', max_length=24)
    with pytest.raises(InputError, match='folder of a stage'):
        run(out='new.jsonl', checkpoint=str(tmp_path))
    with pytest.raises(InputError, match='--out=PATH is required'):
        run(out='')


def test_broken_lines_are_all_named(tmp_path):
    file = tmp_path / 'in.jsonl'
    file.write_bytes(
        b'{"prompt": "good"}\n{"prompt": 3}\n\n{"text": "x"}\nno json\n{"prompt": "\xff"}\n'
        b'{"prompt": "x", "temperature": 1}\n{"messages": [{"role": "user"}]}\n'
    )
    with pytest.raises(InputError) as caught:
        read_prompts(file)
    named = [number for number in range(1, 9) if f'line {number}:' in str(caught.value)]
    assert named == [2, 4, 5, 6, 7, 8]
    assert "'temperature', which means nothing here" in str(caught.value)
    file.write_text('\n\n')
    with pytest.raises(InputError, match='no line that is not blank'):
        read_prompts(file)


def test_rows_of_another_kind_are_prompts_by_their_fields(tmp_path):
    file = tmp_path / 'in.jsonl'
    file.write_text('{"question": "2 + 2?", "answer": "4", "id": 7}\n{"question": "3?"}\n')
    prompts = read_prompts(file, 'Q: {question}\nA:')
    assert [(p.line, p.text, p.id, p.messages) for p in prompts] == [
        (1, 'Q: 2 + 2?\nA:', 7, None),
        (2, 'Q: 3?\nA:', None, None),
    ]
    with pytest.raises(InputError, match=r"fields of '\{answer\}':\n  line 2: .*'answer' is miss"):
        read_prompts(file, '{answer}')


def test_a_stream_holds_back_what_may_still_change():
    stream = TextStream(ByteTokenizer(), ['end', '\n\n'])
    given = [stream.feed(byte) for byte in 'aü e.en'.encode()]
    assert given == ['a', '', 'ü', ' ', '', 'e.', '', '']
    assert stream.feed(ord('t')) == 'ent'
    assert not stream.stopped
    assert [stream.feed(byte) for byte in b'xend'] == ['x', '', '', '']
    assert stream.stopped
    broken = TextStream(ByteTokenizer())
    assert broken.feed(0xC3) == ''
    assert broken.feed(0x41) == '\N{REPLACEMENT CHARACTER}A'
    assert TextStream(ByteTokenizer(), ['end']).feed(ord('e'), last=True) == 'e'
