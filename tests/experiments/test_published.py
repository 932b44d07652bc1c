"""A study of a published teacher, its student written as a published model, and conversions."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from launching import Finished, Launcher, metric_rows

import moe
from distill.pretrained_tokenizer import PretrainedTokenizer, write_pretrained
from distill.tokenizer import ByteTokenizer

PADDED = 264  # the tokenizer has 259 ids
STUDENT = (
    '--config.student.model.moe.router.selection_bias=False',
    '--config.student.balance.selection_bias_rate=0.0',
    '--config.student.model.moe.dispatch=dense',
)
# Upcycled from the teacher's folder: the same model at step 0, and a mixture of experts.
START = (
    '--config.student.init.method=upcycle',
    '--config.student.init.source=hf',
    '--config.student.init.provenance.licence=apache-2.0',
    '--config.student.init.provenance.permits_training=true',
    '--config.student.model.num_layers=2',
    '--config.student.model.tie_embeddings=false',
)


@pytest.fixture(scope='module')
def published(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A published model with a licence, random and tiny."""
    folder = tmp_path_factory.mktemp('published') / 'tiny-qwen'
    config = moe.TransformerConfig(PADDED, 2, 16, 32, moe.AttentionConfig(2, 2, 8, 'head'))
    variables = jax.jit(moe.Transformer(config).init)(jax.random.key(0), np.zeros((1, 1), int))
    plain = jax.tree.map(lambda box: box.unbox(), variables, is_leaf=lambda x: hasattr(x, 'unbox'))
    tokenizer = folder.parent / 'tokenizer'
    write_pretrained(ByteTokenizer(), tokenizer)
    card = '---\nlicense: apache-2.0\n---\n'
    moe.save_pretrained(folder, config, plain, tokenizer=tokenizer, card=card)
    return folder


@pytest.fixture(scope='module')
def study(
    launcher: Launcher, published: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """The whole study of that teacher, its export too."""
    workdir = tmp_path_factory.mktemp('study') / 'run'
    finished = launcher.run(
        *launcher.flags(
            workdir,
            '--config.teacher.source=hf',
            f'--config.teacher.checkpoint={published}',
            '--config.teacher.provenance.licence=apache-2.0',
            '--config.teacher.provenance.permits_training=true',
            '--stages=teacher,student,control,evaluate,report,export',
            *STUDENT,
            *START,
            f'--config.student.init.checkpoint={published}',
        ),
        devices=1,
    )
    assert finished.status == 0, finished.output
    return workdir


def test_the_student_has_the_vocabulary_of_its_teacher(study: pathlib.Path) -> None:
    config, variables = moe.load_pretrained(study / 'export' / 'model', dtype='float32')
    assert config.vocab_size == PADDED
    assert variables['params']['embed']['embedding'].shape == (PADDED, 16)
    assert config.moe is not None
    assert json.loads((study / 'export' / 'result.json').read_text())['family'] == 'qwen3_moe'
    tokenizer = PretrainedTokenizer(study / 'export' / 'model')
    np.testing.assert_array_equal(tokenizer.encode('aé'), [97, 0xC3, 0xA9])
    summary = json.loads((study / 'summary.json').read_text())
    assert 'steps' not in summary['stages']['teacher']
    assert summary['models']['teacher']['parameters']['total'] > 0


def test_the_student_starts_from_a_published_model(study: pathlib.Path) -> None:
    start = json.loads((study / 'summary.json').read_text())['student_start']
    sha256 = start.pop('source_sha256')
    declared = dict(name='tiny-qwen', version=sha256[:16], licence='apache-2.0')
    assert start == {
        'method': 'upcycle',
        'source': 'published model',
        'provenance': {**declared, 'permits_training': True},
    }
    first, *_, last = metric_rows(study, 'student')
    assert abs(first['forward_kl']) < 1e-6 < last['forward_kl']
    card = (study / 'export' / 'model' / 'README.md').read_text()
    for text in ((study / 'report.html').read_text(), card):
        assert f'start from the published model tiny-qwen {sha256[:16]}; licence: apache' in text


def test_the_card_says_what_was_measured(study: pathlib.Path) -> None:
    card = (study / 'export' / 'model' / 'README.md').read_text()
    student = json.loads((study / 'summary.json').read_text())['models']['student']
    bits = student['bits_per_byte']
    assert f'{bits["value"]:.4g} ({bits["low"]:.4g} to {bits["high"]:.4g})' in card
    for text in (
        'license: apache-2.0',
        'published model in `tiny-qwen`',
        '0.1 x cross_entropy, 0.9 x forward_kl; 12 steps of 8 rows',
        'python -m experiments.launch',
        'USD per million tokens',
        'fewer than its control',
    ):
        assert text in card
    # The cost of nothing but what was measured.
    assert '| KL from teacher, nats per token |  |' in card


def test_a_student_no_family_can_express_is_refused_before_training(
    launcher: Launcher, tmp_path: pathlib.Path
) -> None:
    stages = '--stages=teacher,student,control,evaluate,report,export'
    finished = launcher.run(*launcher.flags(tmp_path / 'run', stages))
    assert finished.status == 2
    assert 'moe.router.selection_bias=False; here True' in finished.output
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--config.teacher.source=hf'], "goes with source='hf'"),
        (
            ['--config.teacher.source=hf', '--config.teacher.checkpoint=/nowhere'],
            r'/nowhere must be a folder with a config\.json',
        ),
    ],
)
def test_teachers_that_are_not_there(
    flags: list[str], message: str, launcher: Launcher, tmp_path: pathlib.Path
) -> None:
    finished = launcher.run(*launcher.flags(tmp_path / 'run', *flags))
    assert finished.status == 2
    assert re.search(message, finished.output)


def test_there_and_back(
    launcher: Launcher, published: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A folder becomes a checkpoint of ours, and that a folder, with the same bytes."""

    def convert(source: pathlib.Path, out: pathlib.Path) -> Finished:
        return launcher.run(f'--source={source}', f'--out={out}', command='convert', devices=1)

    stage, again = tmp_path / 'run' / 'teacher', tmp_path / 'again'
    for finished in (convert(published, stage), convert(stage, again)):
        assert finished.status == 0, finished.output
    weights = [folder / 'model.safetensors' for folder in (published, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (again / 'tokenizer.json').read_text() == (published / 'tokenizer.json').read_text()
    refused = convert(stage, again)
    assert refused.status == 2
    assert 'must be an empty folder' in refused.output
