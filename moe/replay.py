"""Routing as a value: records of what routers chose, checked before a replay, written and read."""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moe.config import TransformerConfig
from moe.errors import InputError
from moe.stacking import module_kind
from moe.types import RouterOutput

Record = RouterOutput | Int[Array, 'B T K'] | np.ndarray
Replay = Sequence[Record]

_FIELDS = tuple(RouterOutput.__dataclass_fields__)


def recorded_ids(
    config: TransformerConfig, replay: Replay, shape: tuple[int, ...], *, modules: int = 0
) -> tuple[list[Int[Array, 'B T K']], list[Int[Array, 'B T K']]]:
    """Takes the chosen experts out of a record, once it is sure that it is one of this model's.

    Args:
        config: of the model that replays.
        replay: for each MoE layer, in order, its `RouterOutput` or the ids of it; after them of
            each module of multi-token prediction that has experts and is run.
        shape: (B, T) of the tokens that are routed.
        modules: how many of them are run.

    Returns:
        The ids of each MoE layer, and of each module, int32.

    Raises:
        InputError: for a model without such ids, or a record of other layers, tokens or experts.
    """
    layers = sum(config.moe_layers)
    if not module_kind(config).has_experts:
        modules = 0
    if config.moe is None or config.moe.router.choice == 'soft':
        received = 'a dense model' if config.moe is None else "router.choice='soft'"
        raise InputError(
            f'replay needs routers that choose experts; received {received}. Leave replay out.'
        )
    if len(replay) != layers + modules:
        also = f' and of the {modules} modules of multi-token prediction' if modules else ''
        raise InputError(
            f'replay needs one record for each of the {layers} MoE layers{also}; received '
            f'{len(replay)}. Pass ModelOutput.all_routers of a pass of this model with the same '
            'argument `mtp`.'
        )
    router = config.moe.router
    experts = router.num_experts
    columns = experts if router.choice == 'expert' else router.experts_per_token
    ids = [_checked(i, record, (*shape, columns), experts) for i, record in enumerate(replay)]
    return ids[:layers], ids[layers:]


def _checked(number: int, record: Record, shape: tuple[int, ...], experts: int) -> Array:
    ids = record.expert_ids if isinstance(record, RouterOutput) else record
    if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(
            f'replay[{number}] must hold integer expert ids of shape {shape}: tokens, and experts '
            f'of each; received {ids.dtype}{ids.shape}. Replay a record of these tokens, or the '
            'part of it that belongs to them.'
        )
    if isinstance(ids, np.ndarray):
        # Values of a traced array are not known, and those of one on a device not at once.
        _check_values(f'replay[{number}]', ids, experts)
    return jnp.asarray(ids, jnp.int32)


def _check_values(where: str, ids: np.ndarray, experts: int) -> None:
    """Requires experts that there are, `experts` standing for none, and each once a token."""
    if ids.size and (ids.min() < 0 or ids.max() > experts):
        raise InputError(
            f'{where} must hold ids in [0, {experts}], where {experts} stands for no expert; '
            f'received ids from {ids.min()} to {ids.max()}. Replay a record of this model.'
        )
    ordered = np.sort(ids, axis=-1)
    repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < experts)
    if repeated.any():
        raise InputError(
            f'{where} must name an expert at most once for a token; {repeated.any(-1).sum()} '
            'tokens have one twice. Replay a record of a router of this model.'
        )


def save_routing(path: str | os.PathLike[str], routers: Sequence[RouterOutput]) -> None:
    """Writes what every router decided, all fields, to one `.npz` file.

    Args:
        path: of the file, which is replaced where there is one; its name must end in `.npz`.
        routers: `ModelOutput.all_routers`, or `router`; one or more.

    Raises:
        InputError: for another ending, or for no routers.
    """
    if not str(path).endswith('.npz'):
        raise InputError(f'A record of routing is an .npz file; received {str(path)!r}. Rename it.')
    if not routers:
        raise InputError('save_routing needs the record of at least one MoE layer; received none.')
    arrays = {
        f'{layer}/{field}': np.asarray(jax.device_get(getattr(router, field)))
        for layer, router in enumerate(routers)
        for field in _FIELDS
    }
    np.savez_compressed(path, allow_pickle=False, **arrays)


def load_routing(path: str | os.PathLike[str]) -> tuple[RouterOutput, ...]:
    """Reads what `save_routing` wrote, bit for bit.

    Args:
        path: of the file.

    Returns:
        The `RouterOutput`s, of NumPy arrays, in order.

    Raises:
        InputError: where there is no such file, it holds something else, or ids that no router
            chooses.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise InputError(
            f'{str(path)!r} must be a file that save_routing wrote; it cannot be read: {error}.'
        ) from error
    layers = len(arrays) // len(_FIELDS)
    expected = {f'{layer}/{field}' for layer in range(layers) for field in _FIELDS}
    if not layers or set(arrays) != expected:
        raise InputError(
            f'{str(path)!r} must hold {", ".join(_FIELDS)} of each MoE layer, as save_routing '
            f'writes them; it holds {sorted(arrays)}.'
        )
    records = [
        RouterOutput(**{field: arrays[f'{layer}/{field}'] for field in _FIELDS})
        for layer in range(layers)
    ]
    for layer, record in enumerate(records):
        experts = record.router_logits.shape[-1]
        _check_values(f'Layer {layer} of {str(path)!r}', np.asarray(record.expert_ids), experts)
    return tuple(records)
