"""A student starts from published weights, or is refused by name before anything trains."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import get_config

import moe
from distill.pretrained_tokenizer import write_pretrained
from distill.tokenizer import ByteTokenizer, train_bpe
from experiments.context import Context
from experiments.initial import initial_variables, require_source, started_from
from experiments.signals import StopSignal
from moe.config import MoEConfig, RouterConfig
from moe.convert import folder_sha256
from moe.errors import InputError
from moe.sharding import abstract_variables

KEY = jax.random.key(5)
PADDED = 264  # the tokenizer has 259 ids
TOKENS = jnp.arange(32).reshape(2, 16) * 7 % 259
ATTENTION = moe.AttentionConfig(2, 2, 8, 'head')
DENSE = moe.TransformerConfig(PADDED, 2, 16, 32, ATTENTION, tie_embeddings=True)
EXPERTS = moe.TransformerConfig(
    PADDED, 2, 16, 48, ATTENTION, MoEConfig(RouterConfig(8, 2), expert_dim=24), norm_eps=1e-5
)


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Published models, random and tiny; 'other' has another tokenizer, 'wide' more room for it."""
    root = tmp_path_factory.mktemp('published')
    tokenizers = {'bytes': ByteTokenizer(), 'bpe': train_bpe(['ab ab ab abc'], 262)}
    for name, tokenizer in tokenizers.items():
        write_pretrained(tokenizer, root / name)
    wide = moe.TransformerConfig(272, 2, 16, 32, ATTENTION, tie_embeddings=True)
    models = {
        'dense': (DENSE, 'bytes'),
        'experts': (EXPERTS, 'bytes'),
        'other': (DENSE, 'bpe'),
        'wide': (wide, 'bytes'),
    }
    for name, (config, tokenizer) in models.items():
        shapes = abstract_variables(moe.Transformer(config))
        variables = jax.tree.map(_drawn, shapes)
        moe.save_pretrained(root / name, config, variables, tokenizer=root / tokenizer)
    return {name: root / name for name in models}


def _drawn(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.random.default_rng(leaf.size).normal(scale=0.2, size=leaf.shape).astype(leaf.dtype)


def _logits(config: moe.TransformerConfig, variables: Any) -> jax.Array:
    return jax.jit(moe.Transformer(config).apply)(variables, TOKENS).logits


def context_of(
    folders: dict[str, pathlib.Path], workdir: pathlib.Path, start: str | None, **changes: object
) -> Context:
    """The tiny study of the published 'dense', its student made of another published model."""
    declared = dict(licence='MIT', permits_training=True)
    config = get_config()
    config.teacher.update(source='hf', checkpoint=str(folders['dense']), provenance=declared)
    config.mesh.update(data=2, fsdp=2, expert=2)
    config.student.model.update(num_layers=2)
    config.student.model.moe.router.selection_bias = False
    config.student.balance.selection_bias_rate = 0.0
    config.student.init.method = 'upcycle'
    if start is not None:
        published = dict(source='hf', checkpoint=str(folders[start]), provenance=declared)
        config.student.init.update(published)
    config.update_from_flattened_dict(changes)
    return Context(config, str(workdir), command='test', stop=StopSignal())


def test_a_copy_is_the_published_model_run_as_the_config_says(folders, tmp_path):
    ahead = {'student.model.mtp_depth': 1, 'student.mtp_weight': 0.3}
    changes = {'student.init.method': 'copy', 'student.model.moe.dispatch': 'dense'}
    changes |= {'student.model.scan_layers': True}
    context = context_of(folders, tmp_path, 'experts', **changes, **ahead)
    require_source(context)
    config = context.study.student.model
    assert (config.embed_dim, config.mlp_dim, config.norm_eps) == (16, 48, 1e-5)
    assert config.moe is not None
    assert config.moe.router == RouterConfig(8, 2)
    assert (config.moe.dispatch, config.mtp_depth) == ('dense', 1)
    made = initial_variables(context, KEY)['params']
    _, expected = moe.load_pretrained(folders['experts'], dtype='float32')
    assert made.pop('mtp_1')['projection'].shape == (32, 16)
    jax.tree.map(np.testing.assert_array_equal, made, expected['params'])
    sha256 = folder_sha256(folders['experts'])
    assert started_from(context) == {
        'method': 'copy',
        'source': 'published model',
        'source_sha256': sha256,
        'provenance': {
            'name': 'experts',
            'version': sha256[:16],
            'licence': 'MIT',
            'permits_training': True,
        },
    }


@pytest.mark.parametrize('start', ['dense', None], ids=['published', 'teacher'])
def test_what_is_upcycled_of_a_published_model_is_that_model(folders, tmp_path, start):
    """Also where the study's own teacher is the published one, and the student is made of it."""
    context = context_of(folders, tmp_path, start, **{'student.model.moe.router.num_experts': 8})
    require_source(context)
    made = jax.device_get(initial_variables(context, KEY))
    config, variables = moe.load_pretrained(folders['dense'], dtype='float32')
    logits = _logits(context.study.student.model, made)
    np.testing.assert_allclose(logits, _logits(config, variables), atol=1e-5)
    assert started_from(context)['source_sha256'] == folder_sha256(folders['dense'])


@pytest.mark.parametrize(
    ('start', 'changes', 'message'),
    [
        ('other', {}, r'checkpoint=.*other must have the tokenizer of the study'),
        (
            'dense',
            {'student.model.embed_dim': 32},
            'the published model.*keeps embed_dim: the .*16',
        ),
        ('experts', {}, "'upcycle' cannot make .*the published model.*"),
        (
            'wide',
            {'student.init.method': 'copy'},
            'keeps vocab_size: the source has 272, the t.*264',
        ),
    ],
)
def test_what_cannot_be_started_from_is_refused(folders, tmp_path, start, changes, message):
    with pytest.raises(InputError, match=message):
        require_source(context_of(folders, tmp_path, start, **changes))


def test_a_folder_that_is_not_there_is_refused_when_the_study_is_built(tmp_path):
    nowhere = {'student.init.source': 'hf', 'student.init.checkpoint': '/nowhere'}
    copy = {'student.init.method': 'copy', 'teacher.source': 'train'}
    with pytest.raises(InputError, match=r'nowhere must be a folder with a config\.json'):
        context_of({'dense': tmp_path}, tmp_path, None, **nowhere, **copy)
