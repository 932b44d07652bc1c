"""Routers that need more than hidden states, through the whole decoder."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.attention_kinds import empty_cache
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=24,
    num_layers=2,
    embed_dim=8,
    mlp_dim=8,
    attention=AttentionConfig(2, 1, 4),
    moe=MoEConfig(RouterConfig(4, 1), 4),
)
TOKENS = jax.random.randint(jax.random.key(7), (2, 8), 0, 24)


def with_router(router: RouterConfig, **fields) -> Transformer:
    assert CONFIG.moe is not None
    moe = dataclasses.replace(CONFIG.moe, router=router)
    return Transformer(dataclasses.replace(CONFIG, moe=moe, **fields))


def init(model: Transformer):
    return jax.jit(lambda key: nn.unbox(model.init(key, TOKENS)))(jax.random.key(0))


@pytest.mark.parametrize('choice', ['expert', 'soft'])
def test_a_cache_is_refused_where_routing_looks_ahead(choice):
    model = with_router(RouterConfig(4, 4, choice=choice))
    cache = empty_cache(model.config, 2, 8)
    with pytest.raises(InputError, match=f"Decoding with a cache needs.*choice='{choice}'"):
        jax.eval_shape(lambda key: model.init(key, TOKENS, cache=cache), jax.random.key(0))


def test_hash_reaches_every_layer():
    model = with_router(RouterConfig(4, 1, choice='hash'))
    output = jax.jit(model.apply)(init(model), TOKENS)
    first, second = (router.expert_ids[..., 0] for router in output.router)
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first)) > 1
    for token in np.unique(TOKENS):
        assert len(np.unique(np.asarray(first)[token == TOKENS])) == 1


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_jitter_differs_by_layer_and_its_gradient_sees_the_same_noise(remat):
    model = with_router(RouterConfig(4, 1, jitter=0.3), remat=remat)
    variables = init(model)
    # Layers alike, blocks that add nothing: both routers would see the same without noise.
    params = variables['params']['group_0']['layer_0']
    params['attention']['o'] *= 0
    params['moe']['down'] *= 0
    kernel = params['moe']['router']['kernel']
    params['moe']['router']['kernel'] = jnp.stack([kernel[0], kernel[0]])

    @jax.jit
    def loss(variables, key):
        output = model.apply(variables, TOKENS, rngs={'jitter': key})
        logits = jnp.stack([router.router_logits for router in output.router])
        return (logits**2).sum(), logits

    calm = model.apply(variables, TOKENS).router
    np.testing.assert_allclose(calm[0].router_logits, calm[1].router_logits, rtol=1e-5)
    (total, logits), gradient = jax.value_and_grad(loss, has_aux=True)(variables, jax.random.key(3))
    assert np.abs(logits[0] - logits[1]).max() > 0.05
    # Logits are linear in the kernels: of a square, kernel . gradient is twice the value.
    slope = (
        params['moe']['router']['kernel']
        * (gradient['params']['group_0']['layer_0']['moe']['router']['kernel'])
    )
    np.testing.assert_allclose(slope.sum(), 2 * total, rtol=1e-4)
