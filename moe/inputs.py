"""What a `Transformer` can be given, checked before anything is traced."""

import jax.numpy as jnp
from jaxtyping import Array

from moe.errors import InputError
from moe.types import KVCache


def check_inputs(
    tokens: Array,
    positions: Array | None,
    segment_ids: Array | None,
    mask: Array | None,
    cache: KVCache | None,
) -> None:
    """Raises an `InputError` for arguments of `Transformer` with a wrong dtype or shape."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(
            f'tokens must be integer ids of shape [B, T]; received {tokens.dtype}{tokens.shape}. '
            f'Encode text with the tokenizer, and add a batch axis to a single row.'
        )
    others = {'positions': positions, 'segment_ids': segment_ids, 'mask': mask}
    for name, value in others.items():
        kind = jnp.bool_ if name == 'mask' else jnp.integer
        if value is None:
            continue
        if value.shape != tokens.shape or not jnp.issubdtype(value.dtype, kind):
            raise InputError(
                f'{name} must be {"bool" if name == "mask" else "integers"} of the shape of '
                f'tokens, {tokens.shape}; received {value.dtype}{value.shape}.'
            )
    if cache is not None and cache.segment_ids.shape[0] != tokens.shape[0]:
        raise InputError(
            f'The cache must have one row for each row of tokens, {tokens.shape[0]}; it has '
            f'{cache.segment_ids.shape[0]}. Make it with empty_cache(config, batch, num_slots).'
        )
    if cache is not None and cache.segment_ids.shape[1] < tokens.shape[1]:
        raise InputError(
            f'The cache must have a slot for each token that will ever be written; it has '
            f'{cache.segment_ids.shape[1]}, and there are {tokens.shape[1]} tokens. Give '
            f'empty_cache more slots.'
        )
