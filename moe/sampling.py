"""How a token is drawn from logits: each row by settings and by a key of its own."""

import dataclasses
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from moe.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits, in this order.

    Attributes:
        repetition_penalty: divides the positive logits of tokens that the row holds already, prompt
            and all, and multiplies the negative ones; 1 leaves them.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keeps that many likeliest tokens; 0 keeps all.
        top_p: keeps the fewest likeliest tokens whose probabilities sum to at least this.
        min_p: keeps the tokens that are at least this fraction as likely as the likeliest.

    Source: arXiv 1909.05858 (repetition penalty), 1904.09751 (top-p), 2407.01082 (min-p).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        finite = math.isfinite(self.temperature)
        checks = {
            'temperature': (finite and self.temperature >= 0, 'zero (greedy) or more'),
            'top_k': (self.top_k >= 0, 'a count of tokens, or 0 for all'),
            'top_p': (0 < self.top_p <= 1, 'in (0, 1]'),
            'min_p': (0 <= self.min_p <= 1, 'in [0, 1]'),
            'repetition_penalty': (0 < penalty < math.inf, 'positive; 1 for none'),
        }
        for name, (valid, required) in checks.items():
            if not valid:
                raise InputError(f'{name} must be {required}; received {getattr(self, name)!r}.')


@flax.struct.dataclass
class SamplingRows:
    """The settings of each row, as arrays: see `Sampling`."""

    temperature: Float[Array, 'B']
    top_k: Int[Array, 'B']
    top_p: Float[Array, 'B']
    min_p: Float[Array, 'B']
    repetition_penalty: Float[Array, 'B']


def sampling_rows(settings: Sequence[Sampling]) -> SamplingRows:
    """Stacks settings, one for each row (NumPy arrays: nothing is put on a device)."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.asarray([getattr(row, name) for row in settings], dtype)

    names = [field.name for field in dataclasses.fields(Sampling)]
    columns = {name: column(name, np.int32 if name == 'top_k' else np.float32) for name in names}
    return SamplingRows(**columns)  # type: ignore


def penalise(
    logits: Float[Array, 'B V'], seen: Bool[Array, 'B V'], penalty: Float[Array, 'B']
) -> Float[Array, 'B V']:
    """Makes the tokens that a row has seen less likely; see `Sampling.repetition_penalty`."""
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)


def filter_logits(logits: Float[Array, 'B V'], rows: SamplingRows) -> Float[Array, 'B V']:
    """Divides by the temperature, then removes what top-k, top-p and min-p leave out.

    Top-p looks at the probabilities at that temperature, renormalised over what top-k kept; the
    likeliest token always stays, and is all that stays at temperature 0. Among equal logits the
    lower id counts as the likelier.

    Args:
        logits: of one position each.
        rows: the settings; penalties are not read.

    Returns:
        Logits of the distribution to draw from, -inf where removed.
    """
    greedy = rows.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, rows.temperature)[:, None]
    ranked = ~greedy & ((rows.top_k > 0) | (rows.top_p < 1))
    # A sort of the vocabulary costs more than all the rest: only where a row asks for it.
    kept = jax.lax.cond(ranked.any(), _keep_ranked, _keep_all, scaled, rows)
    kept &= scaled >= scaled.max(axis=-1, keepdims=True) + jnp.log(rows.min_p)[:, None]
    likeliest = jnp.argmax(logits, axis=-1, keepdims=True) == jnp.arange(logits.shape[-1])
    return jnp.where(jnp.where(greedy[:, None], likeliest, kept), scaled, -jnp.inf)


def _keep_all(scaled: Array, rows: SamplingRows) -> Bool[Array, 'B V']:
    return jnp.ones(scaled.shape, bool)


def _keep_ranked(scaled: Array, rows: SamplingRows) -> Bool[Array, 'B V']:
    order = jnp.argsort(scaled, axis=-1, descending=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(scaled.shape[-1])
    kept = rank < jnp.where(rows.top_k > 0, rows.top_k, rank.size)[:, None]
    probs = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # A sum of rounded probabilities may reach 1 too early: top_p = 1 removes nothing.
    kept &= (before < rows.top_p[:, None]) | (rank == 0) | (rows.top_p == 1)[:, None]
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


def sample(
    logits: Float[Array, 'B V'], rows: SamplingRows, keys: Key[Array, 'B']
) -> Int[Array, 'B']:
    """Draws one token a row, by the row's own key: what other rows ask for changes nothing."""

    def draw(logits: Array) -> Array:
        return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, rows))

    def likeliest(logits: Array) -> Array:
        # `argmax` is a reduction of pairs, which XLA does not vectorise on CPUs: two plain ones
        # take a fifth of its time.
        highest = logits == logits.max(axis=-1, keepdims=True)
        ids = jnp.arange(logits.shape[-1])
        return jnp.where(highest, ids, ids[-1]).min(axis=-1)

    greedy = (rows.temperature == 0).all()
    return jax.lax.cond(greedy, likeliest, draw, logits).astype(jnp.int32)


def log_probs_of(
    logits: Float[Array, '*B V'], tokens: Int[Array, '*B']
) -> tuple[Float[Array, '*B'], Float[Array, '*B V']]:
    """Returns the log-probabilities of these tokens and of all, in nats, under plain logits."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0], log_probs


def row_keys(keys: Key[Array, 'B'], written: Int[Array, 'B']) -> Key[Array, 'B']:
    """Returns the key of each row's next token, of the row's key and what it has written."""
    return jax.vmap(jax.random.fold_in)(keys, written)
