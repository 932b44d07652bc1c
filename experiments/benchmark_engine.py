"""Figures of the engine: what its pages of cache save, and what they and its host cost a token."""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distill.timing import interleaved_medians
from experiments.benchmark_decode import CONFIG
from experiments.benchmark_row import Row, ratio_row, this_machine
from moe.attention_kinds import empty_cache
from moe.config import TransformerConfig
from moe.decode import write
from moe.engine import Engine
from moe.requests import EngineConfig, Request
from moe.sampling import Sampling
from moe.transformer import Transformer

ROWS = 16
PROMPT, SHORT = 16, 8
STEPS = 16  # of the engine, in each timed round
UNENDING = 3_000  # more tokens than all rounds write
LONG_PROMPT, SHORT_PROMPT, ENDING = 900, 32, 60


def engine_rows(
    *, config: TransformerConfig = CONFIG, tokens: int = 64, repeats: int = 5
) -> Iterator[Row]:
    """Measures 16 rows of an engine, greedy, float32.

    Args:
        config: the model, of random weights.
        tokens: that are timed of `moe.decode.write`.
        repeats: timed rounds; the median counts.

    Yields:
        The rate of a full batch beside that of `moe.decode.write`, whose cache is in one piece and
        whose loop runs on the device; and the most bytes that the cache came to with one text of
        960 tokens beside fifteen of 92, beside those of 16 rows of slots for the longest, in a
        power of two.
    """
    model = Transformer(config)
    init = jax.jit(lambda key: nn.unbox(model.init(key, jnp.ones((1, 1), jnp.int32))))
    variables = init(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LONG_PROMPT))
    yield _rate(model, variables, prompts[:, :PROMPT], tokens, repeats)
    yield _memory(model, variables, prompts)


def _rate(
    model: Transformer, variables: Any, prompts: np.ndarray, tokens: int, repeats: int
) -> Row:
    engine = Engine(model, variables, EngineConfig(ROWS, PROMPT + UNENDING))
    for prompt in prompts:
        engine.submit(_request(prompt, UNENDING))
    while len(engine.step()) < ROWS:
        pass

    def advance() -> None:
        for _ in range(STEPS):
            engine.step()

    def text(length: int) -> Any:
        settings = {'max_new_tokens': length, 'sampling': Sampling(0.0), 'key': jax.random.key(1)}
        return write(model, variables, prompts, **settings).tokens

    functions = {'engine': advance, 'short': lambda: text(SHORT)}
    functions |= {'long': lambda: text(SHORT + tokens)}
    seconds = interleaved_medians(functions, repeats=repeats)
    value = ROWS * STEPS / seconds['engine']
    reference = ROWS * tokens / (seconds['long'] - seconds['short'])
    what = f'{ROWS} rows of {PROMPT} tokens and more, greedy; reference: moe.decode.write'
    return ratio_row('engine/rate', 'token/s', value, reference, _conditions(what))


def _memory(model: Transformer, variables: Any, prompts: np.ndarray) -> Row:
    long, short = LONG_PROMPT + ENDING, SHORT_PROMPT + ENDING
    engine = Engine(model, variables, EngineConfig(ROWS, long))
    engine.submit(_request(prompts[0], ENDING))
    for prompt in prompts[1:, :SHORT_PROMPT]:
        engine.submit(_request(prompt, ENDING))
    most = 0
    while not engine.idle:
        engine.step()
        most = max(most, engine.cache_use.bytes)
    slots = 1 << (long - 1).bit_length()
    whole = jax.eval_shape(lambda: empty_cache(model.config, ROWS, slots))
    reference = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole))
    what = f'a text of {long} tokens beside {ROWS - 1} of {short}; reference: {slots} slots a row'
    return ratio_row('engine/memory', 'MB', most / 1e6, reference / 1e6, _conditions(what))


def _request(prompt: np.ndarray, new: int) -> Request:
    return Request(tuple(prompt.tolist()), new, Sampling(0.0))


def _conditions(what: str) -> str:
    return f'{what}; float32; {this_machine()}'
