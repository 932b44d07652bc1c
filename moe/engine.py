"""Many texts written at once: a row that has ended is taken by the next prompt at once."""

import collections
import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from moe.engine_steps import (
    Rows,
    Scores,
    empty_rows,
    enter_rows,
    prefill_chunk,
    resize_rows,
    write_token,
)
from moe.filling import Filling, batch_shards
from moe.pages import PageTable, PoolShape
from moe.requests import (
    CacheUse,
    EngineConfig,
    Event,
    QueueFullError,
    Request,
    Token,
    check_request,
)
from moe.sampling import Sampling, sampling_rows
from moe.transformer import Transformer
from moe.writing_inputs import checked_variables, dropless


@dataclasses.dataclass
class _Row:
    """A request that is being written."""

    number: int
    request: Request
    written: int = 0

    @property
    def length(self) -> int:
        return len(self.request.prompt) + self.written


class Engine:
    """Writes requests as they come, on one thread.

    Keys, values and latents are kept in pages (`moe.pages`): a row takes one as its text grows into
    it, and gives all back when it ends; a token reads as many of each row as the longest one holds,
    in a power of two. There is a page for each row at first, and twice as many whenever they do not
    suffice, until nothing is left to write. Prompts are run a chunk at a time, in a cache of their
    own, between the tokens of other rows. No request depends on those beside it.

    Args:
        model: what to write with.
        params: the parameters, or all the variables.
        config: its limits; on a mesh the rows must divide among the devices that split a batch,
            each of which has pages of its own.
        vocab_size: ids below are written and named, where the model's vocabulary is wider than that
            of its tokenizer; None for all.

    Raises:
        InputError: as `EngineConfig`, where the rows do not divide, or where selection biases are
            missing.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        config: EngineConfig | None = None,
        *,
        vocab_size: int | None = None,
    ):
        self.config = config or EngineConfig()
        self._vocab_size = vocab_size or model.config.vocab_size
        self._variables = checked_variables(model, params)
        self._model = dropless(model)
        self._numbers = itertools.count()
        self._waiting: collections.OrderedDict[int, Request] = collections.OrderedDict()
        self._filling: Filling | None = None
        self._places: dict[int, int] = {}  # the row of each that is being read or written
        self._active: list[_Row | None] = [None] * self.config.max_rows
        self._rows: Rows | None = None
        self._size: tuple[int, PoolShape] | None = None
        self._pages = self._no_pages()

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being read or written."""
        return len(self._places)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def cache_use(self) -> CacheUse:
        """What the rows' caches take now."""
        leaves = [] if self._rows is None else jax.tree.leaves(self._rows.cache)
        return CacheUse(sum(x.nbytes for x in leaves), self._pages.total, self._pages.in_use)

    def submit(self, request: Request) -> int:
        """Takes a request and returns its number; nothing is computed yet.

        Raises:
            InputError: where it can never be written.
            QueueFullError: where too many wait.
        """
        check_request(request, self.config, self._vocab_size)
        if self.waiting >= self.config.max_waiting + self._pages.free_rows:
            raise QueueFullError(
                f'{self.waiting} requests wait, as many as may (engine.max_waiting is '
                f'{self.config.max_waiting}). Try again later.'
            )
        number = next(self._numbers)
        self._waiting[number] = request
        return number

    def cancel(self, number: int) -> bool:
        """Forgets a request and frees its row at once; returns whether it was still under way."""
        if number not in self._places:
            return self._waiting.pop(number, None) is not None
        if self._filling is not None:
            self._filling.drop(number)
        self._end(number)
        self._give_back()
        return True

    def step(self) -> list[Event]:
        """Runs one chunk of the next prompts, where a row is free, and writes a token a row."""
        events = self._fill()
        if any(self._active):
            events += self._write()
        self._give_back()
        return events

    def _give_back(self) -> None:
        """Frees the caches that nothing is left to be written in."""
        if self._filling is not None and not self._filling.requests:
            self._filling = None
        if not self._places:
            self._rows, self._pages = None, self._no_pages()

    def _no_pages(self) -> PageTable:
        config, groups = self.config, batch_shards(self._model.mesh)
        longest = config.pages_of(config.max_length)
        most = longest * config.max_rows // groups if config.max_pages is None else config.max_pages
        return PageTable(config.max_rows, groups, longest, most)

    def _end(self, number: int) -> None:
        at = self._places.pop(number)
        self._active[at] = None
        self._pages.free(at)

    def _fill(self) -> list[Event]:
        """Runs a chunk; after the last one the prompts enter free rows."""
        if self._filling is None:
            taken = self._taken()
            if not taken:
                return []
            self._filling = Filling(taken, self._model, self.config, self._vocab_size)
        filling = self._filling
        filling.run(prefill_chunk, self._model, self._variables)
        if not filling.complete:
            return []
        self._filling = None
        return self._enter(filling)

    def _taken(self) -> dict[int, Request]:
        """Takes requests in their order, as long as a row is free that may hold their pages."""
        taken: dict[int, Request] = {}
        while self._waiting and len(taken) < batch_shards(self._model.mesh):
            number, request = next(iter(self._waiting.items()))
            longest = len(request.prompt) + request.max_new_tokens
            row = self._pages.take(self.config.pages_of(longest))
            if row is None:
                break
            self._places[number], taken[number] = row, self._waiting.pop(number)
        return taken

    def _enter(self, filling: Filling) -> list[Event]:
        events = []
        at = np.full(filling.batch, self.config.max_rows, np.int32)
        for place, number, request in filling.placed():
            ends = request.max_new_tokens == 0
            if request.score_prompt:
                finish = 'length' if ends else None
                events.append(Event(number, prompt=filling.scored(place), finish=finish))
            if ends:
                self._end(number)
            else:
                at[place] = self._places[number]
                self._active[at[place]] = _Row(number, request)
        if (at < self.config.max_rows).any():
            operands = (*self._with_room(), filling.rows, filling.padding, at)
            self._rows = enter_rows(self._model, *operands)
        return events

    def _with_room(self) -> tuple[Rows, np.ndarray]:
        """Gives every row a slot for its next token; returns the rows, and the table of pages."""
        for at, row in enumerate(self._active):
            if row is not None:
                self._pages.hold(at, self.config.pages_of(row.length + 1))
        table, chunk = self._pages.table(), self.config.chunk
        size, rows = (table.shape[2] * chunk, PoolShape(*self._pages.shape, chunk)), self._rows
        if rows is None:
            rows = empty_rows(self._model, self.config.max_rows, *size)
        elif self._size != size:
            rows = resize_rows(self._model, rows, *size)
        self._rows, self._size = rows, size  # smaller pools are not kept beside larger ones
        return rows, table

    def _write(self) -> list[Event]:
        active = [(at, row) for at, row in enumerate(self._active) if row is not None]
        rows, table = self._with_room()
        top = self.config.max_top if any(row.request.top_log_probs for _, row in active) else 0
        requests = [None if row is None else row.request for row in self._active]
        self._rows, tokens, scores = write_token(
            self._model,
            self._variables,
            rows,
            table,
            np.array([row is not None for row in self._active]),
            sampling_rows([r.sampling if r else Sampling(0.0) for r in requests]),
            np.array([r.seed if r else 0 for r in requests], np.uint32),
            np.array([row.written if row else 0 for row in self._active], np.int32),
            top=min(top, self._vocab_size),
            vocab_size=self._vocab_size,
        )
        tokens, scores = jax.device_get((tokens, scores))
        return [self._note(at, row, int(tokens[at]), scores) for at, row in active]

    def _note(self, at: int, row: _Row, token: int, scores: Scores) -> Event:
        """Counts a row's new token, and frees the row where it was the last."""
        row.written += 1
        request, finish = row.request, None
        if token in request.stop_ids:
            finish = 'stop'
        elif row.written == request.max_new_tokens:
            finish = 'length'
        if finish is not None:
            self._end(row.number)
        top = tuple(
            (int(id_), float(value))
            for id_, value in zip(scores.top_ids[at], scores.top_log_probs[at], strict=True)
        )[: request.top_log_probs]
        return Event(row.number, Token(token, float(scores.chosen[at]), top), finish=finish)
