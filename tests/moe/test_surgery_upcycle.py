"""Upcycling: the logits stay, what cannot keep them is refused, and every expert is the MLP's."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe.config import AttentionConfig, MoEConfig, TransformerConfig
from moe.errors import InputError
from moe.routing import RouterConfig
from moe.sharding import abstract_variables
from moe.transformer import Transformer
from moe.upcycle import received_weight, upcycle

DENSE = TransformerConfig(
    vocab_size=19,
    num_layers=2,
    embed_dim=8,
    mlp_dim=12,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4),
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, DENSE.vocab_size)
PARAMS = jax.jit(lambda key: nn.unbox(Transformer(DENSE).init(key, TOKENS)))(jax.random.key(0))[
    'params'
]
WHOLE = {'expert_dim': 12}
SLICED = {'expert_dim': 4, 'shared_dim': 4}
BIASED = RouterConfig(
    8, 4, score='sigmoid', num_groups=2, groups_kept=1, selection_bias=True, bias=True
)
UPCYCLED = {
    'copies': MoEConfig(RouterConfig(4, 2), **WHOLE),
    'copies, sigmoid': MoEConfig(RouterConfig(4, 2, score='sigmoid', scale=2.5), **WHOLE),
    'slices': MoEConfig(RouterConfig(8, 4), **SLICED),
    'slices, all chosen': MoEConfig(RouterConfig(4, 4, normalize='none'), **SLICED),
    'slices, groups, biases': MoEConfig(BIASED, bias=True, **SLICED),
}


def logits(config: TransformerConfig, params, routing=None) -> np.ndarray:
    variables = {'params': params, 'routing': routing or {}}
    return np.asarray(jax.jit(Transformer(config).apply)(variables, TOKENS).logits)


EXPECTED = logits(DENSE, PARAMS)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def check_equal(moe: MoEConfig, router_std: float) -> None:
    moe = dataclasses.replace(moe, first_dense_layers=1)
    settings = {'key': jax.random.key(2), 'router_std': router_std}
    config, params, routing = upcycle(DENSE, PARAMS, moe, **settings)
    built = {'params': params, 'routing': routing} if routing else {'params': params}
    assert shapes(built) == shapes(abstract_variables(Transformer(config)))
    np.testing.assert_allclose(logits(config, params, routing), EXPECTED, atol=1e-5)


@pytest.mark.parametrize('moe', UPCYCLED.values(), ids=UPCYCLED)
def test_an_upcycled_model_has_the_logits_of_the_dense_one(moe):
    check_equal(moe, router_std=1.0)


def test_equal_scores_make_a_router_without_normalisation_exact():
    router = RouterConfig(6, 3, score='sigmoid', normalize='none', scale=1.5)
    check_equal(MoEConfig(router, expert_dim=4), router_std=0.0)


def test_stacked_and_unrolled_layers_give_the_same_experts():
    unrolled = dataclasses.replace(DENSE, scan_layers=False)
    layers = {
        f'layer_{i}': jax.tree.map(lambda x, i=i: x[i], PARAMS['group_0']['layer_0'])
        for i in range(2)
    }
    rest = {name: value for name, value in PARAMS.items() if name != 'group_0'}
    moe = MoEConfig(RouterConfig(4, 2), expert_dim=6, layers=(1,))
    settings = {'key': jax.random.key(4), 'noise': 0.1}
    _, flat, _ = upcycle(unrolled, {**rest, **layers}, moe, **settings)
    _, stacked, _ = upcycle(DENSE, PARAMS, moe, **settings)
    assert set(flat['layer_0']) >= {'mlp'}
    assert set(flat['layer_1']) >= {'moe'}
    np.testing.assert_array_equal(
        flat['layer_1']['moe']['gate_up'], stacked['group_0']['layer_1']['moe']['gate_up'][0]
    )


def test_the_experts_of_one_copy_are_the_slices_of_the_mlp_and_share_a_router_column():
    moe = MoEConfig(RouterConfig(4, 2, scale=3.0), expert_dim=4, shared_dim=4, layers=(0,))
    _, params, _ = upcycle(DENSE, PARAMS, moe, key=jax.random.key(5), router_std=0.5)
    mlp = jax.tree.map(lambda x: np.asarray(x[0]), PARAMS['group_0']['layer_0']['mlp'])
    made = jax.tree.map(lambda x: np.asarray(x[0]), params['group_0']['layer_0']['moe'])
    np.testing.assert_array_equal(made['shared']['gate_up'], mlp['gate_up'][:, :, :4])
    np.testing.assert_array_equal(made['shared']['down'], mlp['down'][:4])
    for expert, first in enumerate((4, 8, 4, 8)):
        units = slice(first, first + 4)
        np.testing.assert_array_equal(made['gate_up'][expert], mlp['gate_up'][:, :, units])
        # K = 2 weights that sum to 3: each of the two slices receives 1.5.
        np.testing.assert_allclose(made['down'][expert], mlp['down'][units] / 1.5, rtol=1e-6)
    columns = made['router']['kernel']
    np.testing.assert_array_equal(columns[:, 0], columns[:, 1])
    np.testing.assert_array_equal(columns[:, 2], columns[:, 3])
    assert np.abs(columns[:, 0] - columns[:, 2]).max() > 0.1
    assert 0.3 < columns.std() < 0.8


def test_noise_is_relative_and_differs_between_copies():
    moe = MoEConfig(RouterConfig(4, 1), expert_dim=12)
    quiet = upcycle(DENSE, PARAMS, moe, key=jax.random.key(6))[1]['group_0']['layer_0']['moe']
    loud = upcycle(DENSE, PARAMS, moe, key=jax.random.key(6), noise=0.2)
    loud = loud[1]['group_0']['layer_0']['moe']
    for name in ('gate_up', 'down'):
        added = np.asarray(loud[name] - quiet[name])
        assert 0.15 < added.std() / np.asarray(quiet[name]).std() < 0.25
        assert np.abs(added[0, 0] - added[0, 1]).max() > 0
        assert np.abs(added[0, 0] - added[1, 0]).max() > 0
    np.testing.assert_array_equal(loud['router']['kernel'], quiet['router']['kernel'])


def test_received_weight_in_hand_worked_cases():
    # K weights that sum to scale, over G slices.
    assert received_weight(RouterConfig(8, 4, scale=3.0), 2, tied=False) == pytest.approx(1.5)
    # Two of the four sigmoids of 0.
    tied = RouterConfig(4, 2, score='sigmoid', normalize='none')
    assert received_weight(tied, 1, tied=True) == pytest.approx(1.0)
    assert received_weight(tied, 1, tied=False) is None
    tied = dataclasses.replace(tied, score='softmax', scale=6.0)
    assert received_weight(tied, 1, tied=True) == pytest.approx(3.0)
    tied = RouterConfig(8, 4, score='sigmoid', normalize='before')
    assert received_weight(tied, 2, tied=True) == pytest.approx(0.25)
    # One whole copy and half of another.
    assert received_weight(RouterConfig(8, 3), 2, tied=False) is None
    # The best two experts of every token's hash, whatever they are.
    hashed = RouterConfig(4, 2, choice='hash')
    assert received_weight(hashed, 1, tied=False) == pytest.approx(1.0)
    assert received_weight(hashed, 2, tied=False) is None


@pytest.mark.parametrize(
    ('moe', 'message'),
    [
        (MoEConfig(RouterConfig(4, 3), expert_dim=6), r'can: moe\.router\.experts_per_token=2\.'),
        (MoEConfig(RouterConfig(6, 1), expert_dim=4), r'can: moe\.router\.experts_per_token=3\.'),
        (
            MoEConfig(RouterConfig(4, 2, normalize='none'), expert_dim=12),
            r"can: moe\.router\.normalize='after'\.",
        ),
        (MoEConfig(RouterConfig(8, 2), expert_dim=5), 'must be a positive multiple of'),
        (MoEConfig(RouterConfig(8, 2), expert_dim=4, shared_dim=12), 'must be a positive multiple'),
        (MoEConfig(RouterConfig(7, 2), expert_dim=6), 'multiple of 2, .* The nearest is 8'),
        (MoEConfig(RouterConfig(4, 2, choice='expert'), expert_dim=12), 'hang on the other'),
        (MoEConfig(RouterConfig(4, 4, choice='soft'), expert_dim=12), 'hang on the other tokens'),
    ],
)
def test_what_cannot_equal_the_dense_model_is_refused(moe, message):
    moe = dataclasses.replace(moe, first_dense_layers=1)
    with pytest.raises(InputError, match=message):
        upcycle(DENSE, PARAMS, moe, key=jax.random.key(0))


def test_a_model_with_experts_is_refused():
    moe = MoEConfig(RouterConfig(4, 2), expert_dim=12)
    config = dataclasses.replace(DENSE, moe=moe)
    with pytest.raises(InputError, match='needs a dense model'):
        upcycle(config, PARAMS, moe, key=jax.random.key(0))
