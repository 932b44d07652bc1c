"""Quantised matrices on a mesh: the numbers, the logits and the text of one device, in shards."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
)
from moe.decode import write
from moe.errors import InputError
from moe.quantised import FORMATS
from moe.quantising import matrix_shapes, quantise, quantised_shardings
from moe.sampling import Sampling
from moe.sharding import MeshConfig, make_mesh, variable_shardings
from moe.transformer import Transformer

GROUPED = TransformerConfig(
    32,
    2,
    128,
    16,
    AttentionConfig(4, 2, 4),
    moe=MoEConfig(RouterConfig(4, 2), 128, layers=(1,), dispatch='grouped'),
    scan_layers=False,
)
LATENT = dataclasses.replace(
    GROUPED,
    attention=LatentAttentionConfig(4, 6, 4, 4, 4, query_rank=6),
    moe=dataclasses.replace(GROUPED.moe, shared_dim=16, dispatch='capacity', capacity_factor=2.0),
    tie_embeddings=True,
)
# Two devices along each of three axes.
MESH = MeshConfig(fsdp=2, expert=2, tensor=2)
PROMPTS = jax.random.randint(jax.random.key(1), (8, 3), 0, 32)


@functools.cache
def model_of(config: TransformerConfig):
    model = Transformer(config)
    drawn = jax.jit(lambda key: nn.unbox(model.init(key, PROMPTS)))(jax.random.key(0))
    return model, {'routing': {}} | drawn


def on_mesh(config, mesh):
    model, variables = model_of(config)
    model = model.clone(mesh=make_mesh(mesh))
    assert model.mesh.size == 8
    shardings = {'routing': {}} | variable_shardings(model, model.mesh)
    return model, jax.device_put(variables, shardings)


@pytest.mark.parametrize(
    ('config', 'mesh', 'weights'),
    [
        (GROUPED, MeshConfig(expert=4, tensor=2), 'int8'),
        (GROUPED, MESH, 'int4_experts'),
        (LATENT, MeshConfig(data=2, expert=2, tensor=2), 'fp8'),
        (LATENT, MeshConfig(fsdp=8), 'int8'),
    ],
    ids=['grouped-expert-tensor', 'grouped-all', 'latent-expert-tensor', 'latent-fsdp'],
)
def test_numbers_logits_and_text_are_those_of_one_device(config, mesh, weights):
    alone, variables = model_of(config)
    model, placed = on_mesh(config, mesh)
    whole, split = quantise(alone, variables, weights), quantise(model, placed, weights)
    for (path, found), expected in zip(
        jax.tree.leaves_with_path(split), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_array_equal(
            np.asarray(found, np.float32), np.asarray(expected, np.float32), str(path)
        )
    how = {'max_new_tokens': 3, 'sampling': Sampling(0.0), 'key': jax.random.key(0)}
    expected = np.asarray(write(alone, whole, PROMPTS, **how).tokens)
    np.testing.assert_array_equal(write(model, split, PROMPTS, **how).tokens, expected)
    text = jnp.concatenate([PROMPTS, expected], axis=1)
    logits = (jax.jit(each.apply)(of, text).logits for each, of in ((model, split), (alone, whole)))
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


def test_each_device_holds_its_share_by_hand():
    model, placed = on_mesh(GROUPED, MESH)
    split = quantise(model, placed, 'int4_experts')['quantised']
    pieces = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.shape, split)
    # 4 experts, 128 wide and 128 within, 4 heads and 2 of keys, each of 4; 32 tokens. Groups of 64.
    assert pieces['layer_1']['moe'] == {
        'gate_up': {'values': (2, 2, 64, 64), 'scales': (2, 2, 64, 1)},
        'down': {'values': (2, 64, 64), 'scales': (2, 64, 1)},
    }
    assert pieces['layer_0']['mlp'] == {
        'gate_up': {'values': (2, 8, 64), 'scales': (2, 8, 1)},
        'down': {'values': (64, 8), 'scales': (64, 1)},
    }
    assert pieces['layer_0']['attention'] == {
        'q': {'values': (2, 4, 64), 'scales': (2, 4, 1)},
        'k': {'values': (1, 4, 64), 'scales': (1, 4, 1)},
        'v': {'values': (1, 4, 64), 'scales': (1, 4, 1)},
        'o': {'values': (64, 8), 'scales': (64, 1)},
    }
    assert pieces['head']['kernel'] == {'values': (16, 64), 'scales': (16, 1)}
    # Of the expert layer an eighth on each device: of 4 * 3 * 128 * 128 numbers, and of as many
    # scales, one for 64.
    experts = jax.tree.leaves(pieces['layer_1']['moe'], is_leaf=lambda x: isinstance(x, tuple))
    assert sum(map(math.prod, experts)) == 196_608 // 8 + 196_608 // 64 // 8


def test_rounding_moves_no_weight():
    model, _ = on_mesh(GROUPED, MESH)
    shardings = {'routing': {}} | variable_shardings(model, model.mesh)
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model_of(GROUPED)[1],
        shardings,
    )
    for weights in FORMATS:
        program = jax.jit(functools.partial(quantise, model, weights=weights)).lower(shapes)
        text = program.compile().as_text()
        assert 'all-reduce' in text
        assert not any(move in text for move in ('all-gather', 'all-to-all', 'collective-permute'))


def test_what_a_mesh_would_split_is_refused_by_name():
    model = model_of(GROUPED)[0].clone(mesh=make_mesh(MeshConfig(fsdp=8)))
    assert matrix_shapes(model)
    quantised_shardings(model, 'int8')
    message = r'scales of layer_1/moe/gate_up, one for each group.*size 2\) must be a multiple of 8'
    with pytest.raises(InputError, match=message):
        quantised_shardings(model, 'int4_experts')
