"""What writing takes: prompts, variables, the settings and the key of each row; checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from moe.errors import InputError
from moe.sampling import Sampling, SamplingRows, sampling_rows
from moe.transformer import Transformer


def pad_prompts(prompts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts of any lengths on the left, with 0, and says where they are not padding.

    Raises:
        InputError: where one of them is empty or no list of whole numbers.
    """
    if hasattr(prompts, 'ndim'):
        return np.asarray(prompts), np.ones(np.shape(prompts), bool)
    rows = [np.asarray(prompt) for prompt in prompts]
    for index, row in enumerate(rows):
        if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
            raise InputError(
                f'prompts must each be a list of one or more integer ids; prompt {index} is '
                f'{row.dtype}{row.shape}. Encode text; begin an empty prompt with the bos id.'
            )
    length = max((row.size for row in rows), default=0)
    mask = np.arange(length) >= length - np.array([row.size for row in rows]).reshape(-1, 1)
    tokens = np.zeros(mask.shape, np.int32)
    for row, at, prompt in zip(tokens, mask, rows, strict=True):
        row[at] = prompt
    return tokens, mask


def dropless(model: Transformer) -> Transformer:
    """Returns the model as it decodes: one whose dispatch drops tokens takes 'grouped' instead."""
    config = model.config
    if config.moe is None:
        return model
    dispatch = 'grouped' if config.moe.dispatch == 'capacity' else config.moe.dispatch
    moe = dataclasses.replace(config.moe, dispatch=dispatch, exchange_factor=None)
    return model.clone(config=dataclasses.replace(config, moe=moe))


def checked_variables(model: Transformer, params: Any) -> Mapping[str, Any]:
    """Returns all the variables, of those or of the parameters alone.

    Raises:
        InputError: where the routers have selection biases and there are none.
    """
    variables = params if 'params' in params else {'params': params}
    moe = model.config.moe
    if moe is not None and moe.router.selection_bias and not variables.get('routing'):
        raise InputError(
            'The routers of this model have selection biases, which were not given. Pass all the '
            "variables, {'params': ..., 'routing': ...}, rather than the parameters alone."
        )
    return variables


def sampling_of(sampling: Sampling | Sequence[Sampling], batch: int) -> SamplingRows:
    """Returns the settings of each row, of those or of one for all."""
    settings = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
    if len(settings) != batch:
        raise InputError(
            f'sampling must be one for all {batch} rows or one for each; received {len(settings)}.'
        )
    return sampling_rows(settings)


def keys_of(key: Key[Array, '*B'], batch: int) -> Key[Array, 'B']:
    """Returns the key of each row, of those or of one for all."""
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise InputError(
            f'key must be one for all {batch} rows or one for each; received {key.shape}.'
        )
    return key


def check_writing(
    model: Transformer,
    prompts: np.ndarray,
    mask: np.ndarray,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    top_log_probs: int,
) -> None:
    """Raises an `InputError` for arguments of `write` that cannot be written from."""
    vocab = model.config.vocab_size
    check_prompts(prompts, vocab)
    left_padded = mask.shape == prompts.shape and mask.dtype == bool and mask[:, -1].all()
    if not left_padded or (np.diff(mask.astype(np.int8), axis=1) < 0).any():
        raise InputError(
            f'prompt_mask must be bool of the shape of prompts, {prompts.shape}: in each row False '
            f'for the padding, then True to the end; received {mask.dtype}{mask.shape} with '
            f'{mask.sum()} True. Pad on the left.'
        )
    whole = isinstance(max_new_tokens, int) and not isinstance(max_new_tokens, bool)
    if not whole or max_new_tokens < 1:
        raise InputError(f'max_new_tokens must be a positive integer; received {max_new_tokens!r}.')
    outside = [stop for stop in stop_ids if not 0 <= stop < vocab]
    if outside:
        raise InputError(f'What ends a row must be an id in [0, {vocab}); received {outside}.')
    if not 0 <= top_log_probs <= vocab:
        raise InputError(
            f'top_log_probs must be from 0 to {vocab}, the vocabulary; received {top_log_probs!r}.'
        )


def check_prompts(prompts: np.ndarray, vocab: int) -> None:
    """Raises an `InputError` for what are not ids [B, T] in [0, vocab)."""
    if prompts.ndim != 2 or not prompts.size or not np.issubdtype(prompts.dtype, np.integer):
        raise InputError(
            f'prompts must be integer ids of shape [B, T], neither of them 0; received '
            f'{prompts.dtype}{prompts.shape}. Encode text, and pad shorter prompts on the left.'
        )
    if prompts.min() < 0 or prompts.max() >= vocab:
        raise InputError(
            f'prompts must be ids in [0, {vocab}), the vocabulary of the model; received ids from '
            f'{prompts.min()} to {prompts.max()}. Encode with the tokenizer of the model.'
        )
