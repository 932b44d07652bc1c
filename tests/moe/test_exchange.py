"""Rows travel to the shards that want them: by hand, in float64, and as other platforms do it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe.exchange import (
    Bounds,
    accepted_counts,
    compiler_options,
    exchange_rows,
    segment_of,
)
from moe.expert_parallel import expert_parallel_dispatch

SHARDS, D = 4, 3
# COUNTS[s, r] rows go from s to r: nothing, everything and shards that get nothing are among them.
COUNTS = np.array([[2, 0, 1, 0], [0, 0, 0, 0], [5, 0, 0, 0], [1, 0, 3, 1]])
BOUNDS = Bounds(sent=6, received=9, pair=5)


def on_shards(function):
    mesh = jax.make_mesh((SHARDS,), ('expert',), (AxisType.Auto,), devices=jax.devices()[:SHARDS])
    return jax.shard_map(
        function, mesh=mesh, in_specs=(P('expert'), P('expert')), out_specs=P('expert')
    )


def sent_rows(dtype=np.float64) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(SHARDS * BOUNDS.sent, D)).astype(dtype)


def receivers() -> np.ndarray:
    """Of every row of every shard; -1 for those that stay."""
    out = np.full((SHARDS, BOUNDS.sent), -1)
    for s, counts in enumerate(COUNTS):
        to = np.repeat(np.arange(SHARDS), counts)
        out[s, : len(to)] = to
    return out.reshape(-1)


def received_rows(rows: np.ndarray) -> np.ndarray:
    parts = rows.reshape(SHARDS, BOUNDS.sent, D)
    out = np.zeros((SHARDS, BOUNDS.received, D), rows.dtype)
    for r in range(SHARDS):
        mine = [
            part[to == r] for part, to in zip(parts, receivers().reshape(SHARDS, -1), strict=True)
        ]
        mine = np.concatenate(mine)
        out[r, : len(mine)] = mine
    return out.reshape(-1, D)


def everywhere() -> np.ndarray:
    """The counts, of which every shard has a copy."""
    return np.tile(COUNTS, (SHARDS, 1)).astype(np.int32)


def test_rows_arrive_sorted_by_sender_and_nothing_else_does():
    rows = sent_rows(np.float32)
    run = on_shards(functools.partial(exchange_rows, bounds=BOUNDS))
    actual = jax.jit(lambda *args: run(*args))(rows, everywhere())
    np.testing.assert_array_equal(actual, received_rows(rows))
    there_and_back = on_shards(
        lambda rows, counts: exchange_rows(
            exchange_rows(rows, counts, BOUNDS), counts.T, BOUNDS.reversed
        )
    )
    back = jax.jit(there_and_back)(rows, everywhere())
    np.testing.assert_array_equal(back, np.where(receivers()[:, None] >= 0, rows, 0))


def test_the_gradient_of_an_exchange_in_float64_equals_the_unsharded_one():
    rows, cotangent = sent_rows(), np.random.default_rng(1).normal(size=(SHARDS * BOUNDS.sent, D))

    def there_and_back(rows, counts):
        shard = jax.lax.axis_index('expert')
        received = exchange_rows(rows, counts, BOUNDS)
        changed = jnp.sin(received) * (1 + shard) + jnp.cos(received)
        return exchange_rows(changed, counts.T, BOUNDS.reversed)

    with jax.enable_x64(True):
        run = on_shards(there_and_back)
        y, vjp = jax.vjp(lambda rows: jax.jit(run)(rows, everywhere()), jnp.asarray(rows))
        (gradient,) = vjp(jnp.asarray(cotangent))
        assert gradient.dtype == jnp.float64
    to = receivers()[:, None]
    expected = np.where(to >= 0, np.sin(rows) * (1 + to) + np.cos(rows), 0)
    slope = np.where(to >= 0, cotangent * (np.cos(rows) * (1 + to) - np.sin(rows)), 0)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-14)


def test_senders_are_served_in_order_until_the_room_is_used_up():
    wanted = jnp.array([[3, 0, 1], [2, 4, 0], [9, 0, 5]])
    np.testing.assert_array_equal(accepted_counts(wanted, 4), [[3, 0, 1], [1, 4, 0], [0, 0, 3]])
    np.testing.assert_array_equal(accepted_counts(wanted, 14), wanted)


def test_segments_by_hand():
    found = segment_of(jnp.arange(6), jnp.array([2, 0, 3]))
    np.testing.assert_array_equal(found, [0, 0, 2, 2, 2, 3])


def exchange_text(platform: str) -> str:
    """There and back, and the transpose of both, as lowered for a platform."""

    def there_and_back(rows, counts):
        received = exchange_rows(rows, counts, BOUNDS)
        return exchange_rows(received, counts.T, BOUNDS.reversed)

    def loss(rows):
        return on_shards(there_and_back)(rows, everywhere()).sum()

    traced = jax.jit(jax.value_and_grad(loss)).trace(sent_rows(np.float32))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def dropless_text(platform: str) -> str:
    """A dropless layer and its gradient, as lowered for a platform."""
    axes = ('data', 'fsdp', 'expert', 'tensor')
    mesh = jax.make_mesh((1, 1, 4, 2), axes, (AxisType.Auto,) * 4)
    ids = jnp.zeros((4, 2, 2), jnp.int32).at[..., 1].set(5)
    mask = jnp.ones((4, 2), bool)

    def loss(x, weights, gate_up, down):
        settings = {'mesh': mesh, 'method': 'grouped', 'activation': 'silu'}
        y, _ = expert_parallel_dispatch(x, ids, weights, mask, gate_up, down, **settings)
        return y.sum()

    shapes = ((4, 2, 8), (4, 2, 2), (8, 8, 2, 4), (8, 4, 8))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ('text_of', 'platform', 'ragged', 'padded'),
    [
        (exchange_text, 'tpu', 4, 0),
        (exchange_text, 'cuda', 4, 0),
        (exchange_text, 'cpu', 0, 4),
        # Rows and weights there, outputs back; and the transpose of each.
        (dropless_text, 'tpu', 6, 0),
        (dropless_text, 'cpu', 0, 6),
    ],
)
def test_one_program_has_the_collective_of_each_platform(text_of, platform, ragged, padded):
    text = text_of(platform)
    assert text.count('@ragged_all_to_all') == ragged
    assert text.count('stablehlo.all_to_all') == padded


def test_only_exchanges_between_tpus_have_options() -> None:
    def mesh(platform: str, shards: int):
        device = types.SimpleNamespace(platform=platform)
        return types.SimpleNamespace(devices=np.array([device]), shape={'expert': shards})

    assert compiler_options(mesh('tpu', 2)) == {
        'xla_tpu_enable_async_all_to_all': True,
        'xla_tpu_enable_async_ragged_all_to_all': True,
    }
    assert compiler_options(mesh('tpu', 1)) == compiler_options(mesh('cpu', 2)) == {}
