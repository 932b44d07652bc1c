"""Many texts written at once: a row that has ended is taken by the next prompt at once."""

import collections
import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from moe.decode import checked_variables, dropless
from moe.engine_steps import (
    Rows,
    Scores,
    empty_rows,
    enter_rows,
    grow_rows,
    prefill_chunk,
    write_token,
)
from moe.filling import Filling, batch_shards
from moe.requests import EngineConfig, Event, QueueFullError, Request, Token, check_request
from moe.sampling import Sampling, sampling_rows
from moe.transformer import Transformer


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

    The cache has as many slots as its longest row needs, in powers of two, and is given back when
    nothing is left to write. Prompts are run a chunk at a time between the tokens of other rows. No
    request depends on those beside it.

    Args:
        model: what to write with.
        params: the parameters, or all the variables.
        config: its limits; on a mesh the rows must divide among the devices that split a batch.
        vocab_size: ids below are written and named, where the model's vocabulary is wider than that
            of its tokenizer; None for all.

    Raises:
        InputError: as `EngineConfig`, or where selection biases are missing.
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
        self._active: list[_Row | None] = [None] * self.config.max_rows
        self._rows: Rows | None = None

    @property
    def waiting(self) -> int:
        """Requests that no row is free for yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being read or written."""
        filling = 0 if self._filling is None else len(self._filling.requests)
        return filling + sum(row is not None for row in self._active)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def cache_bytes(self) -> int:
        """Size of the rows' caches as they are now."""
        return 0 if self._rows is None else sum(x.nbytes for x in jax.tree.leaves(self._rows.cache))

    def submit(self, request: Request) -> int:
        """Takes a request and returns its number; nothing is computed yet.

        Raises:
            InputError: where it can never be written.
            QueueFullError: where too many wait.
        """
        check_request(request, self.config, self._vocab_size)
        if self.waiting >= self.config.max_waiting + self._free_rows():
            raise QueueFullError(
                f'{self.waiting} requests wait, as many as may (engine.max_waiting is '
                f'{self.config.max_waiting}). Try again later.'
            )
        number = next(self._numbers)
        self._waiting[number] = request
        return number

    def cancel(self, number: int) -> bool:
        """Forgets a request and frees its row at once; returns whether it was still under way."""
        found = self._waiting.pop(number, None) is not None
        if self._filling is not None:
            found |= self._filling.drop(number)
        for at, row in enumerate(self._active):
            if row is not None and row.number == number:
                self._active[at], found = None, True
        self._give_back()
        return found

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
        if self._filling is None and not any(self._active):
            self._rows = None

    def _free_rows(self) -> int:
        taken = 0 if self._filling is None else len(self._filling.requests)
        return self._active.count(None) - taken

    def _fill(self) -> list[Event]:
        """Runs a chunk; after the last one the prompts enter free rows."""
        if self._filling is None:
            count = min(batch_shards(self._model.mesh), self._free_rows(), self.waiting)
            if not count:
                return []
            taken = dict(self._waiting.popitem(last=False) for _ in range(count))
            self._filling = Filling(taken, self._model, self.config, self._vocab_size)
        filling = self._filling
        filling.run(prefill_chunk, self._model, self._variables)
        if not filling.complete:
            return []
        self._filling = None
        return self._enter(filling)

    def _enter(self, filling: Filling) -> list[Event]:
        events, free = [], [at for at, row in enumerate(self._active) if row is None]
        at = np.full(filling.batch, self.config.max_rows, np.int32)
        for place, number, request in filling.placed():
            ends = request.max_new_tokens == 0
            if request.score_prompt:
                finish = 'length' if ends else None
                events.append(Event(number, prompt=filling.scored(place), finish=finish))
            if not ends:
                at[place] = free.pop(0)
                self._active[at[place]] = _Row(number, request)
        if (at < self.config.max_rows).any():
            self._make_room(filling.num_slots)
            assert self._rows is not None
            new = grow_rows(self._model, filling.rows, self._num_slots())
            self._rows = enter_rows(self._model, self._rows, new, filling.padding, at)
        return events

    def _num_slots(self) -> int:
        return 0 if self._rows is None else self._rows.cache.segment_ids.shape[1]

    def _make_room(self, slots: int) -> None:
        """Gives the rows `slots` slots at least."""
        if self._rows is None:
            self._rows = empty_rows(self._model, self.config.max_rows, slots)
        elif self._num_slots() < slots:
            self._rows = grow_rows(self._model, self._rows, slots)

    def _write(self) -> list[Event]:
        active = [(at, row) for at, row in enumerate(self._active) if row is not None]
        self._make_room(Filling.slots_for(max(row.length for _, row in active) + 1, self.config))
        assert self._rows is not None
        top = self.config.max_top if any(row.request.top_log_probs for _, row in active) else 0
        requests = [None if row is None else row.request for row in self._active]
        self._rows, tokens, scores = write_token(
            self._model,
            self._variables,
            self._rows,
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
            self._active[at] = None
        top = tuple(
            (int(id_), float(value))
            for id_, value in zip(scores.top_ids[at], scores.top_log_probs[at], strict=True)
        )[: request.top_log_probs]
        return Event(row.number, Token(token, float(scores.chosen[at]), top), finish=finish)
