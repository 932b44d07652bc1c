"""Which layers have experts, by hand and in the model; and experts taken out of their stack."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.expert_weights import split_experts
from moe.experts import MoELayer
from moe.presets import preset
from moe.sharding import abstract_variables
from moe.transformer import Transformer
from moe.unstacked import split_layers

DENSE = TransformerConfig(16, 6, 8, 12, AttentionConfig(2, 1, 4))
MOE = MoEConfig(RouterConfig(4, 2), expert_dim=6)


@pytest.mark.parametrize(
    ('fields', 'layers'),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({'first_dense_layers': 2}, [2, 3, 4, 5]),
        ({'layer_step': 2}, [1, 3, 5]),
        ({'layer_step': 3, 'first_dense_layers': 3}, [5]),
        ({'layers': (0, 4)}, [0, 4]),
        ({'layers': (0, 4), 'layer_step': 2, 'first_dense_layers': 5}, [0, 4]),
    ],
)
@pytest.mark.parametrize('scan_layers', [False, True])
def test_experts_are_where_the_config_says(fields, layers, scan_layers):
    moe = dataclasses.replace(MOE, **fields)
    config = dataclasses.replace(DENSE, moe=moe, scan_layers=scan_layers)
    assert np.flatnonzero(config.moe_layers).tolist() == layers
    shapes = abstract_variables(Transformer(config))['params']
    zeros = jax.tree.map(lambda x: np.zeros(x.shape), shapes)
    trees, _ = split_layers(config, zeros)
    assert [i for i, tree in enumerate(trees) if 'moe' in tree] == layers
    assert [i for i, tree in enumerate(trees) if 'mlp' in tree] == sorted({*range(6)} - {*layers})


def test_patterns_that_leave_no_experts_or_name_no_layer_are_refused():
    for fields in ({'first_dense_layers': 6}, {'layer_step': 7}, {'layers': ()}):
        with pytest.raises(InputError, match='None for a model without MoE layers'):
            dataclasses.replace(DENSE, moe=dataclasses.replace(MOE, **fields))
    with pytest.raises(InputError, match=r'indices in \[0, 6\); received \[6, -1\]'):
        dataclasses.replace(DENSE, moe=dataclasses.replace(MOE, layers=(6, 1, -1)))


def test_published_patterns():
    def layers(name: str) -> list[int]:
        return np.flatnonzero(preset(name).moe_layers).tolist()

    assert layers('deepseek-v3') == list(range(3, 61))
    assert layers('kimi-k2') == list(range(1, 61))
    assert layers('moonlight-16b-a3b') == list(range(1, 27))
    assert layers('qwen3-30b-a3b') == list(range(48))
    assert layers('llama-3.1-8b') == []


def test_experts_one_by_one_make_the_layer():
    """The fused stack of a layer, taken apart, gives what the layer gives, token by token."""
    config = dataclasses.replace(MOE, bias=True, dispatch='grouped')
    layer = MoELayer(config, 'clamped_swiglu')
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 5, 8)), jnp.float32)
    mask = jnp.ones((1, 5), bool)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x, mask)['params']
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    params = nn.unbox(params)
    y, router = layer.apply({'params': params}, x, mask)
    experts = [jax.tree.map(lambda w: np.asarray(w, np.float64), e) for e in split_experts(params)]
    for t in range(5):
        total = np.zeros(8)
        for e, weight in zip(router.expert_ids[0, t], router.expert_weights[0, t], strict=True):
            own, token = experts[int(e)], np.asarray(x[0, t], np.float64)
            gate = np.minimum(token @ own['gate'] + own['gate_bias'], 7)
            up = np.clip(token @ own['up'] + own['up_bias'], -7, 7)
            hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            total += float(weight) * (hidden @ own['down'] + own['down_bias'])
        np.testing.assert_allclose(y[0, t], total, rtol=2e-5, atol=1e-3)
