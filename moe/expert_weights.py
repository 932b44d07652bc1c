"""Expert parameters one by one, as checkpoints store them, and stacked, as the layer does."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array

from moe.errors import InputError


def split_experts(params: Mapping[str, Array]) -> tuple[dict[str, Array], ...]:
    """Takes a layer's stacked expert parameters apart.

    Args:
        params: `gate_up` [E, D, 2, F] and `down` [E, F, D]; where the experts have biases also
            `gate_up_bias` [E, 2, F] and `down_bias` [E, D]. Others (`router`, `shared`) are left.

    Returns:
        For each expert `gate` and `up` [D, F] and `down` [F, D]; with biases also `gate_bias` and
        `up_bias` [F] and `down_bias` [D].
    """
    return tuple(_one_expert(params, e) for e in range(params['down'].shape[0]))


def _one_expert(params: Mapping[str, Array], e: int) -> dict[str, Array]:
    gate_up = params['gate_up'][e]
    expert = {'gate': gate_up[:, 0], 'up': gate_up[:, 1], 'down': params['down'][e]}
    if 'down_bias' in params:
        gate_bias, up_bias = params['gate_up_bias'][e]
        expert |= {'gate_bias': gate_bias, 'up_bias': up_bias, 'down_bias': params['down_bias'][e]}
    return expert


def stack_experts(experts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Puts experts together again; undoes `split_experts`.

    Args:
        experts: in the order of their ids, at least one, all with the same names.

    Returns:
        The stacked parameters.

    Raises:
        InputError: where experts differ in their names.
    """
    names = set(experts[0])
    for e, expert in enumerate(experts):
        if set(expert) != names:
            raise InputError(
                f'Every expert must have {sorted(names)}, as expert 0; expert {e} has '
                f'{sorted(expert)}. Give all experts biases, or none.'
            )

    def stacked(name: str) -> Array:
        return jnp.stack([expert[name] for expert in experts])

    params = {'gate_up': jnp.stack([stacked('gate'), stacked('up')], 2), 'down': stacked('down')}
    if 'down_bias' in names:
        gate_up_bias = jnp.stack([stacked('gate_bias'), stacked('up_bias')], 1)
        params |= {'gate_up_bias': gate_up_bias, 'down_bias': stacked('down_bias')}
    return params
