"""One suite for every way to send tokens to experts: on one device, and split over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from moe.dispatch import ExpertBiases, dispatch, sequence_capacity, slot_plan, sort_by_group
from moe.expert_parallel import expert_parallel_dispatch

B, T, D, E, F = 2, 12, 6, 6, 4
CAPACITY = ('capacity', 'expert-parallel capacity')
DROPLESS = ('grouped', 'expert-parallel dropless')
WAYS = ('dense', *CAPACITY, *DROPLESS)


def send(way: str, *operands, **settings):
    """Dispatches in one of five ways; experts and their hidden axis are each split in two."""
    method = 'capacity' if way in CAPACITY else 'grouped' if way in DROPLESS else 'dense'
    if not way.startswith('expert-parallel'):
        return dispatch(*operands, method=method, **settings)
    axes, devices = ('data', 'fsdp', 'expert', 'tensor'), jax.devices()[:4]
    mesh = jax.make_mesh((1, 1, 2, 2), axes, (AxisType.Auto,) * 4, devices=devices)
    return expert_parallel_dispatch(*operands, mesh=mesh, method=method, **settings)


def choices(kind: str, k: int) -> np.ndarray:
    """Distinct experts for each token, spread in the way the name says."""
    rng = np.random.default_rng(k)
    order = np.argsort(rng.normal(size=(B, T, E)), axis=-1)
    if kind == 'one takes all':
        order = np.broadcast_to(np.roll(np.arange(E), -3), (B, T, E))
    if kind == 'empty experts':
        keep = order[(order != 0) & (order != 3)].reshape(B, T, E - 2)
        order = np.concatenate([keep, np.broadcast_to([0, 3], (B, T, 2))], axis=-1)
    if kind == 'uneven':
        order = np.argsort(rng.normal(size=(B, T, E)) + 1.5 * np.arange(E), axis=-1)
    return order[..., :k]


def operands(dtype: str = 'float32', k: int = 2, seed: int = 0):
    rng = np.random.default_rng(seed)
    x, gate_up, down, cotangent = (
        jnp.array(rng.normal(size=shape), dtype)
        for shape in ((B, T, D), (E, D, 2, F), (E, F, D), (B, T, D))
    )
    weights = jnp.array(rng.uniform(0.1, 1, size=(B, T, k)), jnp.float32)
    return x, weights, gate_up, down, cotangent


def some_masked() -> np.ndarray:
    mask = np.ones((B, T), bool)
    mask[0, 3:6] = mask[1, 9:] = mask[1, 0] = False
    return mask


@functools.partial(jax.jit, static_argnames=('way', 'factor'))
def output_and_gradients(x, weights, gate_up, down, cotangent, ids, mask, way, factor=100.0):
    def run(x, weights, gate_up, down):
        settings = {'activation': 'silu', 'capacity_factor': factor}
        return send(way, x, ids, weights, mask, gate_up, down, **settings)

    y, vjp, dropped = jax.vjp(run, x, weights, gate_up, down, has_aux=True)
    return {'y': y, 'dropped': dropped, 'gradients': vjp(cotangent)}


def assert_equal(actual, expected, tolerance):
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        scale = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(got / scale, want / scale, atol=tolerance)


def token_loop(x, weights, gate_up, down, ids, mask):
    """One token and one choice at a time, in float64."""
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    y = np.zeros(x.shape)
    for b, t, k in np.ndindex(*ids.shape):
        if mask[b, t]:
            gate, up = np.einsum('d,dcf->cf', x[b, t], gate_up[ids[b, t, k]])
            hidden = gate / (1 + np.exp(-gate)) * up
            y[b, t] += weights[b, t, k] * hidden @ down[ids[b, t, k]]
    return y


@pytest.mark.parametrize('masked', [False, True])
def test_the_oracle_equals_a_loop_over_tokens_and_its_gradient_the_slope(masked):
    args, ids = operands(), choices('uneven', 2)
    mask = some_masked() if masked else np.ones((B, T), bool)
    oracle = output_and_gradients(*args, ids, mask, 'dense')
    np.testing.assert_allclose(oracle['y'], token_loop(*args[:4], ids, mask), rtol=1e-4, atol=1e-5)

    rng = np.random.default_rng(5)
    point = [np.asarray(a, np.float64) for a in args[:4]]
    cotangent = np.asarray(args[4], np.float64)
    for i, gradient in enumerate(oracle['gradients']):
        direction = rng.normal(size=point[i].shape)
        ahead = [a + 1e-6 * direction if j == i else a for j, a in enumerate(point)]
        behind = [a - 1e-6 * direction if j == i else a for j, a in enumerate(point)]
        difference = token_loop(*ahead, ids, mask) - token_loop(*behind, ids, mask)
        slope = (difference * cotangent).sum() / 2e-6
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('k', 'dtype'), [(1, 'float32'), (2, 'float32'), (E, 'float32'), (2, 'bfloat16')]
)
@pytest.mark.parametrize('way', WAYS[1:])
def test_every_dispatch_equals_the_oracle(way, k, dtype):
    args = operands(dtype, k)
    for kind in ('random', 'uneven', 'empty experts', 'one takes all'):
        for mask in (np.ones((B, T), bool), some_masked(), np.zeros((B, T), bool)):
            ids = choices(kind, k)
            expected = output_and_gradients(*args, ids, mask, 'dense')
            actual = output_and_gradients(*args, ids, mask, way)
            assert_equal(actual, expected, 2e-6 if dtype == 'float32' else 2e-2)
            assert actual['y'].dtype == args[0].dtype
            assert actual['dropped'] == 0


@pytest.mark.parametrize('way', WAYS)
def test_masked_tokens_get_and_give_nothing(way):
    x, weights, *rest = operands()
    ids, mask = choices('random', 2), some_masked()
    clean = output_and_gradients(x, weights, *rest, ids, mask, way)
    assert np.all(clean['y'][~mask] == 0)
    assert all(np.all(np.asarray(g)[~mask] == 0) for g in clean['gradients'][:2])

    poisoned_x = jnp.where(mask[..., None], x, jnp.nan)
    poisoned_ids = np.where(mask[..., None], ids, 0)
    dirty = output_and_gradients(poisoned_x, weights, *rest, poisoned_ids, mask, way)
    np.testing.assert_array_equal(clean['y'], dirty['y'])
    np.testing.assert_array_equal(clean['gradients'][2], dirty['gradients'][2])


def test_sorting_keeps_the_order_within_an_expert_and_leaves_masked_assignments_out():
    plan, sizes = sort_by_group(jnp.array([[2, 0], [3, 3], [0, 2]]), 3)
    np.testing.assert_array_equal(sizes, [2, 0, 2])
    np.testing.assert_array_equal(plan.source, [1, 4, 0, 5, 6, 6])
    np.testing.assert_array_equal(plan.row, [[2, 0], [6, 6], [1, 3]])


def test_capacity_serves_earlier_positions_then_better_choices():
    # Expert 0 is wanted by token 0 (second), 1 (first), 2 (masked), 3 (second): two slots.
    ids = jnp.array([[[1, 0], [0, 2], [0, 1], [2, 0]], [[0, 1], [0, 1], [0, 1], [0, 1]]])
    mask = jnp.array([[True, True, False, True], [True, True, True, True]])
    plan, dropped = slot_plan(ids, mask, 3, 2)
    # Row (e * B + b) * C + c; 12 rows in all, and 12 for an assignment without one.
    expected = [[4, 0], [1, 8], [12, 12], [9, 12], [2, 6], [3, 7], [12, 12], [12, 12]]
    np.testing.assert_array_equal(plan.row, expected)
    np.testing.assert_array_equal(plan.source, [1, 2, 8, 10, 0, 16, 9, 11, 3, 6, 16, 16])
    assert dropped == 1 + 4


@pytest.mark.parametrize('way', CAPACITY)
def test_capacity_drops_exactly_what_finds_no_slot(way):
    args = operands()
    ids = np.zeros((B, T, 2), int)
    ids[..., 1] = 1 + np.arange(T) % 4
    mask = some_masked()
    slots = sequence_capacity(T, 2, E, 1.25)
    assert slots == 5
    actual = output_and_gradients(*args, ids, mask, way, 1.25)
    # Experts 1 to 4 want at most 3 a sequence; expert 0 wants 9 and 8.
    assert actual['dropped'] == (9 - 5) + (8 - 5)
    kept = mask.cumsum(axis=1) <= slots
    x, weights, *rest = args
    served = weights.at[..., 0].multiply(kept)
    expected = output_and_gradients(x, served, *rest, ids, mask, 'dense')
    np.testing.assert_allclose(actual['y'], expected['y'], atol=2e-5)
    weight_gradient = np.asarray(actual['gradients'][1])
    assert np.all(weight_gradient[..., 0][~kept] == 0)
    assert np.all(weight_gradient[..., 0][kept & mask] != 0)


@pytest.mark.parametrize('way', CAPACITY)
def test_the_error_of_a_token_is_within_its_dropped_weight_times_its_largest_expert(way):
    args, ids, mask = operands(), choices('uneven', 2), np.ones((B, T), bool)
    x, weights, gate_up, down, _ = args
    exact = output_and_gradients(*args, ids, mask, 'dense')
    actual = output_and_gradients(*args, ids, mask, way, 0.75)
    error = np.linalg.norm(np.asarray(exact['y']) - actual['y'], axis=-1)
    # What is dropped has no gradient in its weight.
    dropped = np.asarray(actual['gradients'][1]) == 0
    assert dropped.sum() == actual['dropped'] > 0
    lone = [
        np.linalg.norm(
            token_loop(x, jnp.ones((B, T, 1)), gate_up, down, ids[..., k : k + 1], mask), axis=-1
        )
        for k in range(2)
    ]
    bound = np.where(dropped, weights, 0).sum(-1) * np.maximum(*lone)
    assert np.all(error <= bound + 1e-4)
    # Reached where the one expert that a token lost is its largest.
    larger = np.stack(lone, axis=-1) == np.maximum(*lone)[..., None]
    tight = (dropped & larger).any(-1) & (dropped.sum(-1) == 1)
    assert tight.any()
    np.testing.assert_allclose(error[tight], bound[tight], rtol=1e-3)


def test_capacity_does_not_depend_on_the_other_sequences():
    args, ids, mask = operands(), choices('uneven', 2), np.ones((B, T), bool)
    both = output_and_gradients(*args, ids, mask, 'capacity', 1.0)
    x, weights, gate_up, down, cotangent = args
    parts = [
        output_and_gradients(
            x[b : b + 1],
            weights[b : b + 1],
            gate_up,
            down,
            cotangent[b : b + 1],
            ids[b : b + 1],
            mask[b : b + 1],
            'capacity',
            1.0,
        )
        for b in range(B)
    ]
    assert both['dropped'] == sum(part['dropped'] for part in parts) > 0
    joined = np.concatenate([part['y'] for part in parts])
    np.testing.assert_allclose(both['y'], joined, atol=1e-5)


def biased_loop(x, weights, gate_up, down, gate_up_bias, down_bias, ids, mask):
    """One token and one choice at a time, in float64, with the clamped activation."""
    y = np.zeros(x.shape)
    for b, t, k in np.ndindex(*ids.shape):
        e = ids[b, t, k]
        if mask[b, t] and e < E:
            gate, up = np.einsum('d,dcf->cf', x[b, t], gate_up[e]) + gate_up_bias[e]
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            y[b, t] += weights[b, t, k] * (hidden @ down[e] + down_bias[e])
    return y


@functools.partial(jax.jit, static_argnames='way')
def biased_output_and_gradients(arrays, cotangent, ids, mask, way):
    def run(x, weights, gate_up, down, gate_up_bias, down_bias):
        biases = ExpertBiases(gate_up_bias, down_bias)
        settings = {'activation': 'clamped_swiglu', 'capacity_factor': 100.0, 'biases': biases}
        return send(way, x, ids, weights, mask, gate_up, down, **settings)[0]

    y, vjp = jax.vjp(run, *arrays)
    return y, vjp(cotangent)


@pytest.mark.parametrize('way', WAYS)
def test_biases_and_absent_choices_equal_a_loop_and_gradients_the_slope(way):
    x, weights, gate_up, down, cotangent = operands()
    rng = np.random.default_rng(7)
    biases = [jnp.array(rng.normal(size=shape), jnp.float32) for shape in ((E, 2, F), (E, D))]
    arrays = (x, weights, 3 * gate_up, down, *biases)
    ids, mask = choices('uneven', 2), some_masked()
    ids = np.where(rng.uniform(size=ids.shape) < 0.3, E, ids)
    y, gradients = biased_output_and_gradients(arrays, cotangent, ids, mask, way)
    point = [np.asarray(a, np.float64) for a in arrays]
    expected = biased_loop(*point, ids, mask)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=point[i].shape)
        ahead, behind = (
            [a + step * direction if j == i else a for j, a in enumerate(point)]
            for step in (1e-6, -1e-6)
        )
        difference = biased_loop(*ahead, ids, mask) - biased_loop(*behind, ids, mask)
        slope = (difference * np.asarray(cotangent, np.float64)).sum() / 2e-6
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-4, atol=2e-3)
