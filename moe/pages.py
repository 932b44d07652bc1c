"""A cache in pages: rows take from one pool what they need, however long the row beside them is.

What a layer keeps of each token stands in a pool of pages, each laid out as a row of as many slots
would be. A table, one for all layers, says which page holds which of a row's slots. Rows stand in
groups, one for each part that a mesh splits a batch into, and have the pages of their own group: no
row is read from another device. Page 0 of each group is no row's: there stands, and goes, what no
one reads.

Source: arXiv 2309.06180 (PagedAttention).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from moe.errors import InputError


class PoolShape(NamedTuple):
    """How large a pool is.

    Attributes:
        groups: of rows and of pages.
        pages: of each group, page 0 among them.
        page_size: slots of a page.
    """

    groups: int
    pages: int
    page_size: int


def read_pages(
    pool: Shaped[Array, 'G N *page'], table: Int[Array, 'G R P'], axis: int
) -> Shaped[Array, 'B *row']:
    """Returns the slots of every row side by side, along `axis`: `B = G R` rows of `S = P page`."""

    def read(pages: Array, ids: Array) -> Array:
        return pages.at[ids].get(mode='promise_in_bounds')

    (G, R, P), page = table.shape, pool.shape[axis + 1]
    pages = jax.vmap(read)(pool, table).reshape(G * R, P, *pool.shape[2:])
    rows = jnp.moveaxis(pages, 1, axis)
    return rows.reshape(*rows.shape[:axis], P * page, *rows.shape[axis + 2 :])


def write_pages(
    pool: Shaped[Array, 'G N *page'],
    new: Shaped[Array, 'B *new'],
    start: Int[Array, 'B'],
    table: Int[Array, 'G R P'],
    axis: int,
) -> Shaped[Array, 'G N *page']:
    """Writes `new` over each row's slots from `start` on, which the table must have."""
    before = (slice(None),) * (axis - 1)

    def write(pages: Array, ids: Array, places: Array, values: Array) -> Array:
        return pages.at[(ids, *before, places)].set(values, mode='promise_in_bounds')

    (G, R, _), page, T = table.shape, pool.shape[axis + 1], new.shape[axis]
    slots = (start[:, None] + jnp.arange(T)).reshape(G, R, T)
    ids = jnp.take_along_axis(table, slots // page, axis=2)
    # What is taken by indices along axes apart comes first.
    values = jnp.moveaxis(new.astype(pool.dtype), axis, 1)
    return jax.vmap(write)(pool, ids, slots % page, values.reshape(G, R, *values.shape[1:]))


def enter_pages(
    pool: Shaped[Array, 'G N *page'],
    rows: Shaped[Array, 'F *row'],
    at: Int[Array, 'F'],
    table: Int[Array, 'G R P'],
    axis: int,
) -> Shaped[Array, 'G N *page']:
    """Writes whole rows, as far as the table goes, over those in some places; `B` is nowhere."""
    (G, R, P), page, S = table.shape, pool.shape[axis + 1], rows.shape[axis]
    count = min(P, S // page)
    values = jax.lax.slice_in_dim(rows, 0, count * page, axis=axis).astype(pool.dtype)
    values = values.reshape(*rows.shape[:axis], count, page, *rows.shape[axis + 1 :])
    ids = table.reshape(G * R, P)[jnp.minimum(at, G * R - 1), :count]
    return pool.at[at[:, None] // R, ids].set(jnp.moveaxis(values, axis, 1), mode='drop')


class PageTable:
    """Which pages each row holds, and may come to hold.

    A row is taken with a promise of the pages that it needs at its longest, so that none ever stops
    for want of one; pages it takes as it grows, and all go back when it is freed. There are as many
    as rows at first, and twice as many whenever they do not suffice.

    Args:
        rows: how many; a multiple of `groups`.
        groups: that rows are split into, in order.
        longest: pages of one row at most.
        most: pages promised in each group at most.

    Raises:
        InputError: where the rows do not divide among the groups.
    """

    def __init__(self, rows: int, groups: int, longest: int, most: int) -> None:
        if rows % groups:
            raise InputError(
                f'max_rows must be a multiple of {groups}, the parts that the mesh splits rows '
                f'into; received {rows}.'
            )
        self._longest, self._most = longest, most
        self._rows_each = rows // groups
        self._promised = [0] * rows
        self._held: list[list[int]] = [[] for _ in range(rows)]
        self._free: list[list[int]] = [[] for _ in range(groups)]
        self._each = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Groups, and pages of each that there must be, page 0 among them."""
        return len(self._free), self._each + 1

    @property
    def total(self) -> int:
        """Pages that there are for rows."""
        return self._each * len(self._free)

    @property
    def in_use(self) -> int:
        """Pages that rows hold."""
        return sum(map(len, self._held))

    @property
    def free_rows(self) -> int:
        """Rows that nothing was promised."""
        return self._promised.count(0)

    def take(self, pages: int) -> int | None:
        """Takes a row that may come to hold so many pages, one at least.

        Returns:
            The row, of the group with the most pages left; None where no free row may hold as many.
        """
        free = [row for row, promised in enumerate(self._promised) if not promised]
        row = max(free, key=self._left, default=None)
        if row is None or self._left(row) < pages:
            return None
        self._promised[row] = pages
        return row

    def _left(self, row: int) -> int:
        """Pages that are not promised yet, of a row's group."""
        first = row - row % self._rows_each
        return self._most - sum(self._promised[first : first + self._rows_each])

    def hold(self, row: int, pages: int) -> None:
        """Gives a row so many pages, of those that it was promised."""
        assert pages <= self._promised[row]
        held, free = self._held[row], self._free[row // self._rows_each]
        while len(held) < pages:
            if not free:
                self._grow()
            held.append(free.pop())

    def _grow(self) -> None:
        more = min(max(2 * self._each, self._rows_each), self._most)
        for free in self._free:
            free.extend(range(more, self._each, -1))
        self._each = more

    def free(self, row: int) -> None:
        """Takes everything back from a row."""
        self._free[row // self._rows_each].extend(self._held[row])
        self._held[row], self._promised[row] = [], 0

    def table(self) -> Int[np.ndarray, 'G R P']:
        """Returns the pages of each row, as many as the longest holds in a power of two."""
        most = max(map(len, self._held))
        width = min(1 << (max(most, 1) - 1).bit_length(), self._longest)
        table = np.zeros((len(self._held), width), np.int32)
        for pages, held in zip(table, self._held, strict=True):
            pages[: len(held)] = held
        return table.reshape(len(self._free), self._rows_each, width)
