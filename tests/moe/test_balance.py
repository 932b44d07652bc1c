import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.balance import (
    load_balance_loss,
    load_statistics,
    router_confidence,
    router_z_loss,
    updated_bias,
)
from moe.config import RouterConfig
from moe.routing import expert_load, route
from moe.types import RouterOutput

# Two sequences of two tokens, three experts, two choices; the last token is masked.
SCORES = np.array([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]], [[0.1, 0.2, 0.7], [0.9, 0.05, 0.05]]])
IDS = np.array([[[0, 1], [0, 1]], [[2, 1], [0, 1]]])
MASK = jnp.array([[True, True], [True, False]])


def routed(scores=SCORES, ids=IDS, mask=MASK) -> RouterOutput:
    load = expert_load(jnp.array(ids), mask, scores.shape[-1])
    logits = jnp.log(jnp.array(scores, jnp.float32))
    return RouterOutput(logits, jnp.array(ids), jnp.ones(ids.shape), load, jnp.zeros(()))


def test_sequence_loss_by_hand():
    total, weight = load_balance_loss(routed(), MASK)
    # Shares (1/2, 1/2, 0), mean scores (0.55, 0.3, 0.15); then (0, 1/2, 1/2), (0.1, 0.2, 0.7).
    expected = 2 * 3 * (0.275 + 0.15) + 1 * 3 * (0.1 + 0.35)
    np.testing.assert_allclose([total, weight], [expected, 3], rtol=1e-6)


def test_global_loss_by_hand():
    total, weight = load_balance_loss(routed(), MASK, scope='global')
    # Shares (2, 3, 1) / 6; scores sum to (1.2, 0.8, 1.0).
    np.testing.assert_allclose([total, weight], [3 * (2.4 + 2.4 + 1.0) / 6, 3], rtol=1e-6)


def test_sigmoid_scores_are_normalised_first():
    raw = jnp.array([[[2.0, 0.0, -1.0]]])
    ids, one = jnp.array([[[0, 1]]]), jnp.ones((1, 1), bool)
    router = RouterOutput(raw, ids, ids * 1.0, expert_load(ids, one, 3), jnp.zeros(()))
    total, _ = load_balance_loss(router, one, score='sigmoid')
    s = 1 / (1 + np.exp(-np.array([2.0, 0.0, -1.0])))
    np.testing.assert_allclose(total, 3 * (s[0] + s[1]) / 2 / s.sum(), rtol=1e-6)


@pytest.mark.parametrize('scope', ['sequence', 'global'])
@pytest.mark.parametrize('k', [1, 2, 4])
def test_balanced_routing_scores_one(scope, k):
    first = np.arange(8).reshape(2, 4)
    ids = (first[..., None] + np.arange(k)) % 4
    scores = np.full((2, 4, 4), 0.25)
    mask = jnp.ones((2, 4), bool)
    total, weight = load_balance_loss(routed(scores, ids, mask), mask, scope=scope)
    np.testing.assert_allclose(total / weight, 1.0, rtol=1e-6)


@pytest.mark.parametrize('scope', ['sequence', 'global'])
def test_losses_add_up_over_micro_batches(scope):
    whole = load_balance_loss(routed(), MASK, scope=scope)
    z_whole = router_z_loss(routed(), MASK)
    parts, z_parts = np.zeros(2), np.zeros(2)
    for i in range(2):
        part = routed(SCORES[i : i + 1], IDS[i : i + 1], MASK[i : i + 1])
        part = part.replace(load=routed().load)
        parts += np.array(load_balance_loss(part, MASK[i : i + 1], scope=scope))
        z_parts += np.array(router_z_loss(part, MASK[i : i + 1]))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    np.testing.assert_allclose(z_parts, z_whole, rtol=1e-6, atol=1e-12)


def test_masked_tokens_carry_no_gradient():
    def loss(logits, scope):
        router = routed().replace(router_logits=logits)
        return load_balance_loss(router, MASK, scope=scope)[0] + router_z_loss(router, MASK)[0]

    for scope in ('sequence', 'global'):
        gradient = jax.grad(loss)(routed().router_logits + 1.0, scope)
        assert np.all(gradient[1, 1] == 0)
        assert np.all(np.abs(gradient[1, 0]) > 0)


def test_unknown_scope_is_refused():
    with pytest.raises(ValueError, match='scope'):
        load_balance_loss(routed(), MASK, scope='batch')


def test_z_loss_by_hand():
    logits = jnp.array([[[0.0, 0.0], [1.0, 1.0], [90.0, -90.0]]])
    router = RouterOutput(
        logits, jnp.zeros((1, 3, 1), int), jnp.ones((1, 3, 1)), jnp.ones(2), jnp.zeros(())
    )
    total, weight = router_z_loss(router, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(total, np.log(2) ** 2 + (1 + np.log(2)) ** 2, rtol=1e-6)
    assert weight == 2


def test_updated_bias_by_hand():
    bias, load = jnp.array([0.5, 0.5, 0.5, -0.5]), jnp.array([10.0, 0.0, 4.0, 2.0])
    np.testing.assert_allclose(
        updated_bias(bias, load, rate=0.25), [0.25, 0.75, 0.5, -0.25], rtol=1e-6
    )
    stacked = updated_bias(jnp.zeros((2, 2)), jnp.array([[3.0, 1.0], [5.0, 9.0]]), rate=1.0)
    np.testing.assert_array_equal(stacked, [[-1, 1], [1, -1]])


def test_a_micro_batch_is_judged_by_its_own_load_and_the_whole_by_the_given_one():
    second = routed(SCORES[1:], IDS[1:], MASK[1:])
    total, weight = load_balance_loss(
        second, MASK[1:], scope='micro_batch', load=jnp.array([9.0, 0, 0])
    )
    # One token counts: shares (0, 1/2, 1/2), scores (0.1, 0.2, 0.7).
    np.testing.assert_allclose([total, weight], [3 * (0.1 + 0.35), 1], rtol=1e-6)
    total, _ = load_balance_loss(second, MASK[1:], scope='global', load=jnp.array([2.0, 3, 1]))
    np.testing.assert_allclose(total, 3 * (0.2 + 0.6 + 0.7) / 6, rtol=1e-6)


def test_confidence_by_hand():
    np.testing.assert_allclose(router_confidence(routed(), MASK), [0.5 + 0.6 + 0.7, 3], rtol=1e-6)
    s = 1 / (1 + np.exp(-np.log(SCORES)))
    expected = (s.max(-1) / s.sum(-1))[np.asarray(MASK)].sum()
    total, _ = router_confidence(routed(), MASK, score='sigmoid')
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_proportional_bias_by_hand():
    bias, load = jnp.array([0.5, 0.5, 0.5, -0.5]), jnp.array([10.0, 0.0, 4.0, 2.0])
    moved = updated_bias(bias, load, rate=0.5, rule='proportional')
    # The mean is 4.
    np.testing.assert_allclose(moved, [0.5 - 0.75, 1.0, 0.5, -0.25], rtol=1e-6)
    same = updated_bias(bias, jnp.zeros(4), rate=0.5, rule='proportional')
    np.testing.assert_array_equal(same, bias)
    with pytest.raises(ValueError, match='rule'):
        updated_bias(bias, load, rate=0.5, rule='linear')


def test_load_statistics_by_hand():
    stats = load_statistics(jnp.array([6.0, 2.0, 0.0, 0.0]), 2.0)
    np.testing.assert_allclose(stats['max_violation'], (6 - 2) / 2, rtol=1e-6)
    nats = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(stats['entropy'], nats / np.log(4), rtol=1e-6)
    assert (stats['dead_experts'], stats['drop_fraction']) == (2, 0.25)
    balanced = load_statistics(jnp.full(4, 3.0))
    np.testing.assert_allclose(balanced['max_violation'], 0.0, atol=1e-6)
    np.testing.assert_allclose(balanced['entropy'], 1.0, rtol=1e-6)
    np.testing.assert_allclose(balanced['gini'], 0.0, atol=1e-6)
    # All pairs of (6, 2, 0, 0) differ by 4, 6, 6, 2, 2, 0: counted twice, over 16 pairs and 2 * 2.
    np.testing.assert_allclose(stats['gini'], 2 * 20 / 16 / 4, rtol=1e-6)
    empty = load_statistics(jnp.zeros(4))
    assert empty.pop('dead_experts') == 4
    assert [float(v) for v in empty.values()] == [0, 0, 0, 0]


SKEW = jnp.array([4.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0])
STEPS = 150


def skewed_tokens() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (4, 64, 8))


def max_violation(ids: jax.Array) -> float:
    load = expert_load(ids, jnp.ones(ids.shape[:2], bool), 8)
    return float(load_statistics(load)['max_violation'])


@pytest.mark.parametrize('scope', ['sequence', 'global'])
def test_descent_on_the_loss_alone_balances_a_skewed_router(scope):
    x, config, mask = skewed_tokens(), RouterConfig(8, 2), jnp.ones((4, 64), bool)

    def forward(parameters):
        kernel, offset = parameters
        logits = x @ kernel + offset
        ids, weights = route(logits, config)
        return RouterOutput(logits, ids, weights, expert_load(ids, mask, 8), jnp.zeros(()))

    def loss(parameters):
        total, weight = load_balance_loss(forward(parameters), mask, scope=scope)
        return total / weight

    @jax.jit
    def train(parameters):
        def step(_, p):
            return jax.tree.map(lambda p, g: p - 1.0 * g, p, jax.grad(loss)(p))

        return jax.lax.fori_loop(0, STEPS, step, parameters)

    start = (jax.random.normal(jax.random.key(1), (8, 8)) / 8**0.5, SKEW)
    end = train(start)
    assert max_violation(forward(start).expert_ids) > 2.0
    assert max_violation(forward(end).expert_ids) < 0.5
    assert loss(end) < 1.1 < loss(start)


@pytest.mark.parametrize('rule', ['sign', 'proportional'])
def test_the_selection_bias_alone_balances_a_skewed_router(rule):
    config, mask = RouterConfig(8, 2, score='sigmoid', selection_bias=True), jnp.ones((4, 64), bool)
    kernel = jax.random.normal(jax.random.key(1), (8, 8)) / 8**0.5
    logits = skewed_tokens() @ kernel + SKEW

    @jax.jit
    def train(bias):
        def step(_, bias):
            ids, _ = route(logits, config, selection_bias=bias)
            return updated_bias(bias, expert_load(ids, mask, 8), rate=0.01, rule=rule)

        return jax.lax.fori_loop(0, STEPS, step, bias)

    before, _ = route(logits, config, selection_bias=jnp.zeros(8))
    after, _ = route(logits, config, selection_bias=train(jnp.zeros(8)))
    assert max_violation(before) > 2.0
    assert max_violation(after) < 0.3
