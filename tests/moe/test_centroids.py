"""Router columns from the clusters of what a layer reads: planted clusters, and equal logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe.centroids import input_centroids, spherical_means
from moe.config import AttentionConfig, MoEConfig, TransformerConfig
from moe.errors import InputError
from moe.observe import Calibration
from moe.routing import RouterConfig
from moe.surgery import initialise
from moe.transformer import Transformer

KEY = jax.random.key(3)
DENSE = TransformerConfig(19, 2, 8, 12, AttentionConfig(2, 1, 4))
TOKENS = jax.random.randint(jax.random.key(1), (4, 9), 0, 19)
VARIABLES = jax.jit(lambda key: nn.unbox(Transformer(DENSE).init(key, TOKENS)))(jax.random.key(0))


def test_planted_clusters_are_found_without_their_common_direction():
    # Three directions, tokens of other lengths near each, all shifted along a fourth.
    directions = np.eye(4)[:3]
    generator = np.random.default_rng(0)
    member = np.arange(60) % 3
    lengths = generator.uniform(1, 5, 60)
    x = lengths[:, None] * (directions[member] + 0.01 * generator.standard_normal((60, 4)))
    x = x + np.array([0.0, 0.0, 0.0, 100.0])
    x[-6:] = 1e3 * generator.standard_normal((6, 4))
    mask = np.arange(60) < 54
    found = np.asarray(spherical_means(jnp.asarray(x), jnp.asarray(mask), 3, KEY))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    mean = x[:54].mean(0) / np.linalg.norm(x[:54].mean(0))
    np.testing.assert_allclose(found @ mean, 0, atol=1e-5)
    # One column for the members of each cluster, another for each.
    nearest = (x @ found.T).argmax(1)[:54]
    groups = [set(nearest[member[:54] == c]) for c in range(3)]
    assert sorted(len(group) for group in groups) == [1, 1, 1]
    assert set().union(*groups) == {0, 1, 2}


def test_centroids_are_means_of_their_own_members():
    """A fixed point of Lloyd's rounds, against NumPy in float64."""
    x = np.random.default_rng(1).standard_normal((200, 5)) + 1
    found = np.asarray(spherical_means(jnp.asarray(x), jnp.ones(200, bool), 4, KEY), np.float64)
    mean = x.mean(0) / np.linalg.norm(x.mean(0))
    units = x - np.outer(x @ mean, mean)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    nearest = (units @ found.T).argmax(1)
    sums = np.stack([units[nearest == c].sum(0) for c in range(4)])
    np.testing.assert_allclose(found, sums / np.linalg.norm(sums, axis=1, keepdims=True), atol=0.05)


def test_an_upcycled_router_sends_clusters_apart_and_the_logits_stay():
    moe = MoEConfig(RouterConfig(6, 2), expert_dim=6, dispatch='dense', first_dense_layers=1)
    target = dataclasses.replace(DENSE, moe=moe)
    segments = jnp.ones(TOKENS.shape, jnp.int32).at[0, 5:].set(0)
    batch = Calibration(TOKENS, segments)
    options = {'router': 'centroids', 'router_std': 0.5}
    settings = {'key': KEY, 'calibration': batch, 'options': options}
    made = initialise('upcycle', DENSE, VARIABLES, target, **settings)
    output = jax.jit(Transformer(target).apply)(made, TOKENS)
    expected = jax.jit(Transformer(DENSE).apply)(VARIABLES, TOKENS).logits
    np.testing.assert_allclose(output.logits, expected, atol=1e-5)
    # Of the tokens that were measured, every expert has the same mean logit, and some tokens.
    counted = np.asarray(segments) > 0
    logits = np.asarray(output.router[0].router_logits)[counted]
    found = input_centroids(Transformer(DENSE), VARIABLES, batch, 3, key=jax.random.fold_in(KEY, 2))
    assert sorted(found) == [0, 1]
    kernel = np.asarray(made['params']['group_0']['layer_1']['moe']['router']['kernel'][0])
    columns = 0.5 * 8**0.5 * np.asarray(found[1]).T
    np.testing.assert_allclose(kernel, np.repeat(columns, 2, axis=1), rtol=1e-5)
    np.testing.assert_allclose(logits.mean(0), 0, atol=1e-4)
    assert set(np.asarray(output.router[0].expert_ids)[counted].ravel()) == set(range(6))


def test_too_few_tokens_are_refused():
    batch = Calibration(TOKENS, jnp.zeros(TOKENS.shape, jnp.int32).at[0, :3].set(1))
    with pytest.raises(InputError, match=r'4 clusters need as many tokens .* has 3'):
        input_centroids(Transformer(DENSE), VARIABLES, batch, 4, key=KEY)
