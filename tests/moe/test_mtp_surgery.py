"""Modules of multi-token prediction on models that are cut, copied and made anew."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.sharding import abstract_variables
from moe.surgery import initialise, prune_depth, prune_experts, upcycle, without_modules
from moe.transformer import Transformer
from moe.unstacked import split_layers

KEY = jax.random.key(3)
DENSE = TransformerConfig(19, 2, 8, 12, AttentionConfig(2, 1, 4), mtp_depth=1)
MOE = MoEConfig(RouterConfig(4, 2, selection_bias=True), 6, shared_dim=6, dispatch='dense')
SPARSE = dataclasses.replace(DENSE, moe=MOE)
TOKENS = jax.random.randint(jax.random.key(1), (1, 5), 0, 19)


def initial(config: TransformerConfig):
    return jax.jit(lambda key: nn.unbox(Transformer(config).init(key, TOKENS)))(KEY)


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def test_a_copy_keeps_its_modules_and_gets_more_like_the_last_layer():
    variables = initial(SPARSE)
    biases = jax.tree.map(lambda x: x + 1.0, variables['routing'])
    target = dataclasses.replace(SPARSE, mtp_depth=2, scan_layers=False)
    made = initialise('copy', SPARSE, variables | {'routing': biases}, target, key=KEY)
    assert shapes(made) == shapes(abstract_variables(Transformer(target)))
    for collection, old in (('params', variables['params']), ('routing', biases)):
        assert_equal(made[collection]['mtp_1'], old['mtp_1'])
        last = split_layers(target, made[collection])[0][-1]
        assert_equal(made[collection]['mtp_2']['block'], last)
    projections = [made['params'][f'mtp_{d}']['projection'] for d in (1, 2)]
    assert np.abs(projections[0] - projections[1]).max() > 0.01


def test_a_copy_without_modules_is_the_model_alone():
    variables = initial(DENSE)
    target = dataclasses.replace(DENSE, mtp_depth=0)
    made = initialise('copy', DENSE, variables, target, key=KEY)
    assert made['params'].keys() == variables['params'].keys() - {'mtp_1'}
    assert_equal(made['params'], {name: variables['params'][name] for name in made['params']})


def test_other_methods_make_modules_of_the_layers_they_made():
    variables = initial(DENSE)
    made = initialise('upcycle', DENSE, variables, SPARSE, key=KEY)
    assert shapes(made) == shapes(abstract_variables(Transformer(SPARSE)))
    last = split_layers(SPARSE, made['params'])[0][-1]
    assert_equal(made['params']['mtp_1']['block'], last)


def test_layers_are_not_changed_under_modules():
    variables = initial(SPARSE)
    for call in (
        lambda: prune_depth(SPARSE, variables['params'], variables['routing'], [0]),
        lambda: prune_experts(SPARSE, variables['params'], variables['routing'], [[0, 1]] * 2),
        lambda: upcycle(DENSE, initial(DENSE)['params'], MOE, key=KEY),
    ):
        with pytest.raises(InputError, match=r'mtp_depth=1.*without_modules'):
            call()
    config, plain = without_modules(SPARSE, variables)
    assert shapes(plain) == shapes(abstract_variables(Transformer(config)))
    smaller, params, routing = prune_experts(
        config, plain['params'], plain['routing'], [[0, 1]] * 2
    )
    expected = abstract_variables(Transformer(smaller))
    assert shapes({'params': params, 'routing': routing}) == shapes(expected)
