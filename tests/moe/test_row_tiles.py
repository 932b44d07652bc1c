import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.row_tiles import over_tiles, tile_sizes


@pytest.mark.parametrize(
    ('rows', 'groups', 'expected'),
    [
        (8192, 64, list(range(16, 257, 16))),
        # No tile is larger than 512, nor than all the rows.
        (8192, 8, list(range(32, 513, 32))),
        # Loads below 32 rows still have tiles of up to 64, and steps are 8 rows at least.
        (4096, 256, list(range(8, 65, 8))),
        # Few rows have few sizes, for the compiler's sake.
        (333, 6, [32, 64, 96, 112]),
        (40, 4, [32, 40]),
        (1, 3, [1]),
    ],
)
def test_sizes_go_up_to_twice_the_mean_load_in_sixteen_steps(rows, groups, expected):
    assert tile_sizes(rows, groups) == expected


@pytest.mark.parametrize('size', [0, 1, 4, 5, 63, 64, 65, 128, 129, 200])
def test_tiles_hold_each_row_of_the_group_once_and_the_first_is_said_to_be(size):
    rows, groups = 210, 8
    largest = tile_sizes(rows, groups)[-1]
    assert tile_sizes(rows, groups) == [32, 64]

    def tile(carry, first, size, valid, is_first):
        seen, turns, firsts, taken = carry
        here = jax.lax.dynamic_slice_in_dim(seen, first, size) + valid[:, 0]
        seen = jax.lax.dynamic_update_slice_in_dim(seen, here, first, 0)
        return seen, turns + 1, firsts + is_first, taken + size

    @jax.jit
    def visit(start, end):
        carry = (jnp.zeros(rows, int), 0, 0, 0)
        return over_tiles(tile, carry, start=start, end=end, num_rows=rows, num_groups=groups)

    for start in (0, 3, rows - size):
        seen, turns, firsts, taken = visit(start, start + size)
        expected = np.zeros(rows, int)
        expected[start : start + size] = 1
        np.testing.assert_array_equal(seen, expected)
        assert firsts == 1
        assert turns == max(1, -(-size // largest))
        # Less than a step is in vain, but for an empty group's one tile.
        assert taken - size < 32 or size == 0
