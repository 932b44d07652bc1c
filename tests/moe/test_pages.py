"""Pages hold what slots in order would, and none is ever of two rows."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.attention_kinds import empty_cache
from moe.cache_layout import cache_axes, compacted, inserted, resized
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    TransformerConfig,
)
from moe.pages import PageTable, PoolShape, enter_pages, read_pages, write_pages
from moe.transformer import Transformer

RNG = np.random.default_rng(5)


def test_a_worked_case():
    # Two groups of one row each, of two pages with two slots; page 0 is no one's.
    pool = jnp.asarray([[[0, 0], [1, 2], [3, 4]], [[0, 0], [5, 6], [7, 8]]])
    table = jnp.asarray([[[2, 1]], [[1, 0]]])
    assert read_pages(pool, table, axis=1).tolist() == [[3, 4, 1, 2], [5, 6, 0, 0]]
    new, start = jnp.asarray([[10, 20], [30, 40]]), jnp.asarray([1, 0])
    written = write_pages(pool, new, start, table, axis=1)
    # Slots 1 and 2 of the first row: the end of page 2, the start of page 1.
    assert written.tolist() == [[[0, 0], [20, 2], [3, 10]], [[0, 0], [30, 40], [7, 8]]]
    rows = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]])
    entered = enter_pages(pool, rows, jnp.asarray([1, 0, 2]), table, axis=1)
    assert entered[0, 1:].tolist() == [[7, 8], [5, 6]]
    assert entered[1, 1:].tolist() == [[1, 2], [7, 8]]  # of its second page nothing is held


@pytest.mark.parametrize('axis', [1, 2, 3])
def test_pages_are_read_and_written_as_slots_in_order(axis):
    G, R, P, page, T = 2, 3, 4, 5, 7
    table = np.stack([1 + RNG.permutation(R * P).reshape(R, P) for _ in range(G)])
    pool = RNG.normal(size=(G, 1 + R * P, page, 2, 3)).astype(np.float32)
    new = RNG.normal(size=(G * R, T, 2, 3)).astype(np.float32)
    start = RNG.integers(0, P * page - T, G * R)

    def turned(x, slots=1):
        return jnp.moveaxis(jnp.asarray(x), slots, slots + axis - 1)

    written = write_pages(turned(pool, 2), turned(new), jnp.asarray(start), table, axis)
    rows = np.stack([pool[b // R, table[b // R, b % R]] for b in range(G * R)])
    rows = rows.reshape(G * R, P * page, 2, 3)
    np.testing.assert_array_equal(read_pages(turned(pool, 2), table, axis), turned(rows))
    for row, first, tokens in zip(rows, start, new, strict=True):
        row[first : first + T] = tokens
    np.testing.assert_array_equal(read_pages(written, table, axis), turned(rows))
    longer = np.concatenate([rows, np.zeros((G * R, 3, 2, 3), np.float32)], axis=1)
    at = jnp.asarray([*range(1, G * R), 0])
    entered = enter_pages(turned(pool, 2), turned(longer), at, table, axis)
    np.testing.assert_array_equal(read_pages(entered, table, axis)[at], turned(rows))


def test_no_page_is_of_two_rows_and_all_come_back():
    pages = PageTable(rows=6, groups=2, longest=8, most=16)
    longest, held = {}, {}
    for _ in range(400):
        taken = list(longest)
        if taken and RNG.random() < 0.3:
            row = taken[RNG.integers(len(taken))]
            del longest[row], held[row]
            pages.free(row)
        elif taken and RNG.random() < 0.6:
            row = taken[RNG.integers(len(taken))]
            held[row] = int(RNG.integers(held[row], longest[row] + 1))
            pages.hold(row, held[row])
        else:
            most = int(RNG.integers(1, 9))
            row = pages.take(most)
            left = [16 - sum(longest.get(3 * g + r, 0) for r in range(3)) for g in (0, 1)]
            open_ = [left[at // 3] for at in range(6) if at not in longest]
            assert (row is None) == (not open_ or max(open_) < most)
            if row is not None:
                assert row not in longest
                longest[row], held[row] = most, 0
        table = pages.table()
        width = table.shape[2]
        assert width == 1 << (max(1, *held.values(), 0) - 1).bit_length()
        for group, rows in enumerate(table):
            own = [held.get(3 * group + at, 0) for at in range(3)]
            ids = [page for row, count in zip(rows, own, strict=True) for page in row[:count]]
            assert len(set(ids)) == len(ids)
            assert all(1 <= page < pages.shape[1] for page in ids)
            assert all(not row[count:].any() for row, count in zip(rows, own, strict=True))
        assert pages.in_use == sum(held.values())
        assert pages.free_rows == 6 - len(longest)
    for row in longest:
        pages.free(row)
    assert pages.in_use == 0
    assert pages.total <= 32


def test_pools_begin_with_a_page_a_row_and_double():
    pages = PageTable(rows=3, groups=1, longest=10, most=20)
    sizes = []
    row = pages.take(10)
    for count in range(1, 11):
        pages.hold(row, count)
        sizes.append((pages.total, pages.table().shape[2]))
    widths = [1, 2, 4, 4, 8, 8, 8, 8, 10, 10]  # of ten pages a row may hold, not of sixteen
    assert sizes == list(zip([3] * 3 + [6] * 3 + [12] * 4, widths, strict=True))
    other = pages.take(10)
    pages.hold(other, 10)
    assert pages.total == 20
    assert pages.take(1) is None


KINDS = {
    'grouped': (AttentionConfig(4, 2, 8),) * 2,
    'mixed': (
        AttentionConfig(4, 2, 8, window=5, sinks=True),
        LinearAttentionConfig(4, 4, 6, 3),
        LatentAttentionConfig(4, 6, 8, 4, 4),
        AttentionConfig(4, 2, 8),
    ),
}
POOL = PoolShape(groups=2, pages=9, page_size=4)


@pytest.mark.parametrize('name', list(KINDS))
def test_a_model_reads_pages_as_it_reads_slots_in_order(name):
    kinds = KINDS[name]
    config = TransformerConfig(24, len(kinds), 16, 12, kinds, scan_layers=name == 'grouped')
    model = Transformer(config)
    init = jax.jit(lambda key: nn.unbox(model.init(key, jnp.ones((1, 1), jnp.int32))))
    variables, tokens = init(jax.random.key(0)), jnp.asarray(RNG.integers(0, 24, (4, 12)))
    padding = jnp.asarray([0, 5, 2, 1])
    plain, paged = started(model, variables, tokens[:, :6], padding)
    paged = dataclasses.replace(paged, layers=spoiled(config, paged))
    for at in range(6, 12):
        expected, plain = one_token(model, variables, tokens[:, at : at + 1], plain)
        found, paged = one_token(model, variables, tokens[:, at : at + 1], paged)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def spoiled(config, cache):
    """Returns layers in whose pages everything that is not a row's own tokens is not a number."""
    slots = np.arange(12) < np.asarray(cache.length)[:, None]
    own = np.zeros((2, 11, 4), bool)
    for group, table in enumerate(np.asarray(cache.table)):
        own[group, table] = slots.reshape(2, 2, 3, 4)[group]

    def spoil(leaf, axes):
        if 'pages' not in axes:
            return leaf
        places = [axes.index(name) for name in ('batch', 'pages', 'length')]
        others = [at for at in range(leaf.ndim) if at not in places]
        return jnp.where(np.expand_dims(own, others), leaf, jnp.nan)

    return jax.tree.map(spoil, cache.layers, cache_axes(config, paged=True).layers)


@functools.partial(jax.jit, static_argnums=0)
def started(model, variables, tokens, padding):
    """Runs prompts of other lengths, and puts them into pages too."""
    config = model.config
    mask = jnp.arange(6) >= padding[:, None]
    cache = empty_cache(config, 4, 12)
    output = model.apply(variables, tokens, None, mask.astype(jnp.int32), cache=cache)
    plain = compacted(config, output.cache, padding)
    table = jnp.asarray([[[3, 7, 1], [2, 8, 5]], [[4, 1, 6], [8, 2, 3]]])
    paged = dataclasses.replace(empty_cache(config, 4, 12, pool=POOL), table=table)
    paged = inserted(config, paged, plain, jnp.arange(4))
    return plain, resized(config, paged, 12, POOL._replace(pages=11), None)


@functools.partial(jax.jit, static_argnums=0)
def one_token(model, variables, tokens, cache):
    output = model.apply(variables, tokens, cache=cache)
    return output.logits, output.cache
