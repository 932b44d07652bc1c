"""Prompts on their way into an engine's rows: cut into chunks, run, scored."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe.engine_steps import Rows, Scores, empty_rows
from moe.requests import EngineConfig, Request, Token
from moe.sharding import DEFAULT_RULES
from moe.transformer import Transformer


def batch_shards(mesh: Mesh | None) -> int:
    """Returns how many parts a batch is split into; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in DEFAULT_RULES.batch)


class Filling:
    """A few prompts that are run together, as many as a mesh needs for a batch.

    Args:
        requests: by number, in the order of their places.
        model: that runs them.
        config: the engine's.
        vocab_size: ids below may be named as likeliest.
    """

    def __init__(
        self,
        requests: dict[int, Request],
        model: Transformer,
        config: EngineConfig,
        vocab_size: int,
    ) -> None:
        self.requests = requests
        self.batch = batch_shards(model.mesh)
        self._places = {number: place for place, number in enumerate(requests)}
        self._chunk = config.chunk
        longest = max(len(request.prompt) for request in requests.values())
        shape = (self.batch, -(-longest // config.chunk) * config.chunk)
        self._tokens, self._mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for place, request in enumerate(requests.values()):
            start = shape[1] - len(request.prompt)
            self._tokens[place, start:] = request.prompt
            self._mask[place, start:] = True
        self.padding = shape[1] - self._mask.sum(axis=1, dtype=np.int32)
        self._score = any(request.score_prompt for request in requests.values())
        top = any(r.score_prompt and r.top_log_probs for r in requests.values())
        self._top = min(config.max_top, vocab_size) if top else 0
        self._vocab_size = vocab_size
        self._scores: list[Scores] = []
        self._done = 0
        # In a power of two, so that few programs are compiled.
        chunks = shape[1] // config.chunk
        chunks = min(1 << (chunks - 1).bit_length(), config.pages_of(config.max_length))
        self.rows: Rows = empty_rows(model, self.batch, chunks * config.chunk)

    @property
    def complete(self) -> bool:
        """Whether every chunk has been run."""
        return self._done == self._tokens.shape[1] or not self.requests

    def drop(self, number: int) -> bool:
        """Forgets a request; returns whether it was here."""
        return self.requests.pop(number, None) is not None

    def run(self, prefill: Callable[..., Any], model: Transformer, variables: Any) -> None:
        """Runs the next chunk with `prefill`."""
        if self.complete:
            return
        here = slice(self._done, self._done + self._chunk)
        following = np.roll(self._tokens, -1, axis=1)[:, here]
        settings = {'score': self._score, 'top': self._top, 'vocab_size': self._vocab_size}
        operands = (self._tokens[:, here], self._mask[:, here], following, self.padding)
        self.rows, scores = prefill(model, variables, self.rows, *operands, **settings)
        if scores is not None:
            self._scores.append(jax.device_get(scores))
        self._done += self._chunk

    def placed(self) -> Iterator[tuple[int, int, Request]]:
        """Yields place, number and request of each that is still wanted."""
        for number, request in self.requests.items():
            yield self._places[number], number, request

    def scored(self, place: int) -> tuple[Token, ...]:
        """Returns the tokens of one prompt with their log-probabilities."""
        parts = zip(*self._scores, strict=True)
        chosen, ids, values = (np.concatenate(part, axis=1)[place] for part in parts)
        start = self.padding[place]
        number = next(n for n, at in self._places.items() if at == place)
        kept = self.requests[number].top_log_probs
        tokens = [Token(int(self._tokens[place, start]), None)]
        for at in range(start, len(chosen) - 1):
            top = zip(ids[at, :kept].tolist(), values[at, :kept].tolist(), strict=True)
            tokens.append(Token(int(self._tokens[place, at + 1]), float(chosen[at]), tuple(top)))
        return tuple(tokens)
