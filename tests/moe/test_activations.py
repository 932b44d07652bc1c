"""What a pass notes: by hand, scanned or not, rematerialised or not, and nothing unless asked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.activations import ACTIVATIONS, noted_embedding, noted_layers
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
)
from moe.sharding import abstract_variables
from moe.transformer import Transformer
from moe.unstacked import relaid

B, T, V = 2, 5, 11
GROUPED = AttentionConfig(4, 2, 4, qk_norm='head')
CONFIG = TransformerConfig(
    vocab_size=V,
    num_layers=4,
    embed_dim=8,
    mlp_dim=8,
    attention=(GROUPED, LatentAttentionConfig(2, 6, 4, 2, 5)),
    moe=MoEConfig(RouterConfig(4, 2), 4, first_dense_layers=0, dispatch='dense'),
    mtp_depth=1,
    scan_layers=False,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)))
SEGMENTS = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])


@functools.cache
def params():
    rng = np.random.default_rng(1)
    shapes = abstract_variables(Transformer(CONFIG))['params']
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)


@functools.cache
def run(config: TransformerConfig = CONFIG):
    """The output, what each layer noted, and the gradient of a sum over all of it."""
    laid = {'params': relaid(CONFIG, config, params())}

    def everything(variables):
        output, noted = Transformer(config).apply(
            variables, TOKENS, segment_ids=SEGMENTS, mtp=True, mutable=list(ACTIVATIONS)
        )
        layers = {name: noted_layers(config, noted[name]) for name in ACTIVATIONS}
        layers['embedding'] = [noted_embedding(noted['residual'])]
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(layers)), (output, layers)

    (_, aux), gradient = jax.jit(jax.value_and_grad(everything, has_aux=True))(laid)
    return *aux, relaid(config, CONFIG, gradient['params'])


def test_the_stream_is_noted_before_and_after_every_layer():
    output, layers, _ = run()
    embedding = params()['embed']['embedding']
    np.testing.assert_array_equal(layers['embedding'][0], embedding[TOKENS])
    last = np.asarray(layers['residual'][3], np.float64)
    normed = last / np.sqrt((last**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
    expected = normed * np.asarray(params()['final_norm']['scale'])
    np.testing.assert_allclose(output.hidden, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('layer', [0, 1])
def test_attention_is_what_its_queries_keys_and_values_say(layer):
    """The MLP is taken off by weights of zero: the stream moves by attention alone."""
    _, layers, _ = run()
    q, k, v = (np.asarray(layers[name][layer], np.float64) for name in ACTIVATIONS[1:])
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    kind = CONFIG.attention_layers[layer]
    scores = np.einsum('bthd,bshd->bhts', q, k) * kind.score_scale
    segments = np.asarray(SEGMENTS)
    allowed = (segments[:, :, None] == segments[:, None]) & np.tri(T, dtype=bool)
    weights = np.where(allowed[:, None], np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    own = params()[f'layer_{layer}']
    attended = np.einsum('bhts,bshv,hvd->btd', weights, v, own['attention']['o'])
    before = layers['residual'][layer - 1] if layer else layers['embedding'][0]
    silent = {**own, 'moe': jax.tree.map(jnp.zeros_like, own['moe'])}
    alone = dataclasses.replace(CONFIG, num_layers=1, attention=kind, mtp_depth=0)
    embedded = {'embedding': jnp.asarray(before).reshape(B * T, -1)}
    _, noted = Transformer(dataclasses.replace(alone, vocab_size=B * T)).apply(
        {
            'params': {
                'embed': embedded,
                'layer_0': silent,
                'final_norm': params()['final_norm'],
                'head': {'kernel': embedded['embedding'].T},
            }
        },
        jnp.arange(B * T).reshape(B, T),
        segment_ids=SEGMENTS,
        mutable=['residual'],
    )
    moved = noted_layers(alone, noted['residual'])[0] - before
    np.testing.assert_allclose(moved, attended, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('changes', [dict(scan_layers=True, remat='full'), dict(remat='dots')])
def test_scanned_and_rematerialised_models_note_the_same(changes):
    _, layers, gradient = run()
    _, others, its_gradient = run(dataclasses.replace(CONFIG, **changes))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, others, layers)
    jax.tree.map(close, its_gradient, gradient)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient['layer_0'])) > 0


def test_nothing_is_noted_unless_asked_for():
    model, variables = Transformer(CONFIG), {'params': params()}
    shapes = jax.eval_shape(
        lambda v: model.apply(v, TOKENS, mutable=['residual', 'keys'])[1], variables
    )
    assert set(shapes) == {'residual', 'keys'}
    plain = jax.make_jaxpr(lambda v: model.apply(v, TOKENS).hidden)(variables)
    empty = jax.make_jaxpr(lambda v: model.apply(v, TOKENS, mutable=['other'])[0].hidden)(variables)
    assert str(plain) == str(empty)
    assert set(abstract_variables(model)) == {'params'}


def test_linear_attention_has_no_vectors():
    config = dataclasses.replace(
        CONFIG,
        num_layers=2,
        attention=(LinearAttentionConfig(2, 2, 4, 4), GROUPED),
        moe=None,
        mtp_depth=0,
    )
    model = Transformer(config)
    noted = jax.eval_shape(
        lambda v: noted_layers(config, model.apply(v, TOKENS, mutable=['keys'])[1]['keys']),
        abstract_variables(model),
    )
    assert noted[0] is None
    assert noted[1].shape == (B, T, 2, 4)
