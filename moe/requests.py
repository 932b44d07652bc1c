"""What is asked of an engine, and what it answers."""

import dataclasses
from typing import Literal

from moe.errors import InputError
from moe.sampling import Sampling

Finish = Literal['stop', 'length']
MAX_SEED = 2**32 - 1


class QueueFullError(RuntimeError):
    """As many requests wait as may; try again later."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How much an engine takes on.

    Attributes:
        max_rows: how many requests are written at once.
        max_length: tokens of one request at most, its prompt among them.
        chunk: how many tokens of a prompt are run at a time, between the tokens of other rows; and
            how many a page of the cache holds.
        max_waiting: how many requests may wait for a row.
        max_top: how many likeliest tokens a request may have named.
        max_pages: pages that all rows may hold together, of each part that a mesh splits them into;
            a request waits where those that are under way may yet need the pages that it may. None
            for as many as `max_rows` of `max_length` hold.
    """

    max_rows: int = 8
    max_length: int = 2048
    chunk: int = 64
    max_waiting: int = 256
    max_top: int = 20
    max_pages: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == 'max_pages' and value is None:
                continue
            least = 0 if field.name in ('max_top', 'max_waiting') else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(
                    f'engine.{field.name} must be an integer of at least {least}; received '
                    f'{value!r}.'
                )
        longest = self.pages_of(self.max_length)
        if self.max_pages is not None and self.max_pages < longest:
            raise InputError(
                f'engine.max_pages must be at least {longest}, as many as a text of max_length='
                f'{self.max_length} tokens takes at {self.chunk} a page; received '
                f'{self.max_pages}. Raise it, or lower max_length.'
            )

    def pages_of(self, length: int) -> int:
        """Returns how many pages so many tokens take."""
        return -(-length // self.chunk)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
        prompt: ids in [0, V), at least one.
        max_new_tokens: how many to write at most; 0 where only the prompt is to be scored.
        sampling: how tokens are drawn.
        stop_ids: each ends the text, as its last token.
        seed: in [0, 2**32): equal seeds write equal texts, whatever else is being written.
        top_log_probs: how many likeliest tokens are named beside each.
        score_prompt: whether the prompt's own tokens get log-probabilities.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    top_log_probs: int = 0
    score_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a text.

    Attributes:
        id: of the token.
        log_prob: in nats under the model itself, whatever filtered the draw; None for the first
            token of a prompt, which follows nothing.
        top: pairs of id and log-probability of the likeliest tokens there, best first.
    """

    id: int
    log_prob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Event:
    """What has become of a request in one step.

    Attributes:
        request: its number.
        token: that was written, or None.
        prompt: its scored tokens, once, where they were asked for.
        finish: 'stop' by a stop id, 'length' by `max_new_tokens`; None while it goes on.
    """

    request: int
    token: Token | None = None
    prompt: tuple[Token, ...] | None = None
    finish: Finish | None = None


@dataclasses.dataclass(frozen=True)
class CacheUse:
    """What the caches of an engine's rows take.

    Attributes:
        bytes: of all of them; what several devices hold alike counts once.
        pages: that there are for rows.
        pages_in_use: of those the ones that rows hold.
    """

    bytes: int = 0
    pages: int = 0
    pages_in_use: int = 0


def check_request(request: Request, config: EngineConfig, vocab: int) -> None:
    """Raises an `InputError` for what an engine of this config cannot do with this vocabulary."""
    length = len(request.prompt)
    least = 0 if request.score_prompt else 1
    outside = [i for i in (*request.prompt, *request.stop_ids) if not 0 <= i < vocab]
    checks = (
        (length > 0, 'prompt must hold at least one id; begin an empty text with the bos id'),
        (not outside, f'prompt and stop_ids must be ids in [0, {vocab}); received {outside[:8]}'),
        (
            request.max_new_tokens >= least,
            f'max_new_tokens must be at least {least}; received {request.max_new_tokens}',
        ),
        (
            length + request.max_new_tokens <= config.max_length,
            f'prompt and max_new_tokens together must be at most {config.max_length} tokens; '
            f'received {length} + {request.max_new_tokens}',
        ),
        (
            0 <= request.top_log_probs <= min(config.max_top, vocab),
            f'top_log_probs must be from 0 to {min(config.max_top, vocab)}; received '
            f'{request.top_log_probs}',
        ),
        (
            0 <= request.seed <= MAX_SEED,
            f'seed must be in [0, {MAX_SEED}]; received {request.seed}',
        ),
    )
    for valid, words in checks:
        if not valid:
            raise InputError(f'{words}.')
