"""`initialise`: every method reaches its target, and says what stands in the way of another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe.config import AttentionConfig, MoEConfig, TransformerConfig
from moe.errors import InputError
from moe.routing import RouterConfig
from moe.sharding import abstract_variables
from moe.surgery import METHODS, Calibration, initialise, require_reachable
from moe.transformer import Transformer

KEY = jax.random.key(3)
DENSE = TransformerConfig(19, 3, 8, 12, AttentionConfig(4, 2, 4))
ROUTER = RouterConfig(4, 2, selection_bias=True)
MOE = MoEConfig(ROUTER, expert_dim=6, shared_dim=6, dispatch='dense', first_dense_layers=1)
SPARSE = dataclasses.replace(DENSE, moe=MOE)
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, 19)
BATCH = Calibration(TOKENS)
SOURCES = {
    config: jax.jit(lambda key, model: nn.unbox(model.init(key, TOKENS)), static_argnums=1)(
        jax.random.key(0), Transformer(config)
    )
    for config in (DENSE, SPARSE)
}


SEPARATE = dataclasses.replace(SPARSE.moe, storage='per_expert')


def with_router(**changes) -> TransformerConfig:
    router = dataclasses.replace(ROUTER, **changes)
    return dataclasses.replace(SPARSE, moe=dataclasses.replace(MOE, router=router))


NARROW = dataclasses.replace(
    DENSE,
    num_layers=2,
    embed_dim=6,
    mlp_dim=10,
    attention=AttentionConfig(2, 1, 4),
    scan_layers=False,
)
CASES = {
    'copy': (SPARSE, dataclasses.replace(SPARSE, scan_layers=False, param_dtype='bfloat16'), {}),
    'upcycle': (DENSE, SPARSE, {'noise': 0.1, 'router_std': 0.5}),
    'prune': (DENSE, NARROW, {}),
    'prune_experts': (SPARSE, with_router(num_experts=3), {'by': 'frequency'}),
    'merge_experts': (
        SPARSE,
        with_router(num_experts=2, experts_per_token=1),
        {'similarity': 'weights'},
    ),
    'average_experts': (SPARSE, DENSE, {}),
    'concatenate_experts': (SPARSE, DENSE, {}),
}


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def logits(config: TransformerConfig, variables) -> np.ndarray:
    return np.asarray(jax.jit(Transformer(config).apply)(variables, TOKENS).logits)


def test_there_is_a_case_for_every_method():
    assert set(CASES) == set(METHODS)


@pytest.mark.parametrize('method', CASES)
def test_a_method_gives_what_the_targets_model_would_be_initialised_with(method):
    source, target, options = CASES[method]
    made = initialise(
        method, source, SOURCES[source], target, key=KEY, calibration=BATCH, options=options
    )
    assert shapes(made) == shapes(abstract_variables(Transformer(target)))


def test_a_copy_in_another_layout_is_the_same_model():
    target = dataclasses.replace(SPARSE, scan_layers=False)
    made = initialise('copy', SPARSE, SOURCES[SPARSE], target, key=KEY)
    expected = logits(SPARSE, SOURCES[SPARSE])
    np.testing.assert_allclose(logits(target, made), expected, atol=1e-5)
    back = initialise('copy', target, made, SPARSE, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, back, SOURCES[SPARSE])


REFUSED = {
    'unknown method': (('melt', DENSE, DENSE), {}, "one of copy, .* received 'melt'"),
    'unknown option': (
        ('upcycle', DENSE, SPARSE),
        {'nose': 1},
        r"options \['noise', 'router', 'router_std'\]",
    ),
    'another vocabulary': (
        ('upcycle', DENSE, dataclasses.replace(SPARSE, vocab_size=23)),
        {},
        "'upcycle' keeps vocab_size: the source has 19, the target 23",
    ),
    'another width': (
        ('upcycle', DENSE, dataclasses.replace(SPARSE, embed_dim=6)),
        {},
        'keeps embed_dim: .* or use prune',
    ),
    'another scale': (
        ('prune_experts', SPARSE, with_router(num_experts=3, scale=2.0)),
        {},
        r'keeps moe\.router\.scale: the source has 1\.0, the target 2\.0',
    ),
    'experts stored one by one': (
        ('upcycle', DENSE, dataclasses.replace(SPARSE, moe=SEPARATE)),
        {},
        "needs moe.storage='fused'; that of the target is 'per_expert'",
    ),
    'more experts': (('merge_experts', SPARSE, with_router(num_experts=6)), {}, 'at most the 4'),
    'no experts': (('upcycle', DENSE, DENSE), {}, 'target with experts'),
    'experts of a dense model': (('prune_experts', DENSE, DENSE), {}, 'it is dense'),
    'a width no experts make': (
        ('concatenate_experts', SPARSE, dataclasses.replace(DENSE, mlp_dim=11)),
        {},
        'mlp_dim=12',
    ),
    'another window': (
        ('prune', DENSE, dataclasses.replace(DENSE, attention=AttentionConfig(4, 2, 4, window=3))),
        {},
        'number of heads and nothing else',
    ),
    'more layers': (
        ('prune', DENSE, dataclasses.replace(DENSE, num_layers=4)),
        {},
        'num_layers is 3; received 4',
    ),
    'more channels': (
        ('prune', DENSE, dataclasses.replace(DENSE, embed_dim=10)),
        {},
        'embed_dim is 8; received 10',
    ),
    'more heads': (
        ('prune', DENSE, dataclasses.replace(DENSE, attention=AttentionConfig(8, 4, 4))),
        {},
        r'attention\.num_kv_heads is 2; received 4',
    ),
    'an unknown measure': (('prune_experts', SPARSE, SPARSE), {'by': 'luck'}, 'by must be one of'),
    'an unknown similarity': (
        ('merge_experts', SPARSE, SPARSE),
        {'similarity': 'looks'},
        'similarity must be one of',
    ),
    'an unknown router': (('upcycle', DENSE, SPARSE), {'router': 'zeros'}, 'router must be one of'),
    'noise below zero': (('upcycle', DENSE, SPARSE), {'noise': -1.0}, 'must be zero or more'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_reached_is_refused_by_name(case):
    (method, source, target), options, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        require_reachable(method, source, target, options)
    settings = {'key': KEY, 'calibration': BATCH, 'options': options}
    with pytest.raises(InputError, match=message):
        initialise(method, source, SOURCES[source], target, **settings)


@pytest.mark.parametrize('method', CASES)
def test_what_can_be_reached_is_let_through_by_the_configs_alone(method):
    source, target, options = CASES[method]
    require_reachable(method, source, target, options)


def test_a_measuring_method_needs_a_batch_and_the_sources_own_variables():
    with pytest.raises(InputError, match='calibration batch'):
        initialise('prune', DENSE, SOURCES[DENSE], NARROW, key=KEY)
    centroids = {'router': 'centroids'}
    with pytest.raises(InputError, match='calibration batch'):
        initialise('upcycle', DENSE, SOURCES[DENSE], SPARSE, key=KEY, options=centroids)
    wrong = jax.tree.map(lambda x: x, SOURCES[DENSE])
    wrong['params']['head']['kernel'] = jnp.zeros((8, 20))
    with pytest.raises(InputError, match=r'params/head/kernel has shape \(8, 19\) there'):
        initialise('copy', DENSE, wrong, DENSE, key=KEY)
    with pytest.raises(InputError, match=r'routing/.*selection_bias has shape'):
        initialise('copy', SPARSE, {'params': SOURCES[SPARSE]['params']}, SPARSE, key=KEY)


def test_experts_that_are_pruned_in_other_layers_than_the_targets_are_refused():
    moe = dataclasses.replace(MOE, first_dense_layers=0, layers=(0,))
    target = dataclasses.replace(SPARSE, num_layers=2, moe=moe)
    with pytest.raises(InputError, match=r'leaves experts in the layers'):
        initialise('prune', SPARSE, SOURCES[SPARSE], target, key=KEY, calibration=BATCH)
