"""Which family a model is of: the one whose config.json says all that ours does."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe.config import TransformerConfig
from moe.errors import InputError
from moe.families import FAMILIES, Family
from moe.families.fields import Fields

# How a model is computed, stored and trained, not what it computes.
_FREE = {
    'scan_layers',
    'remat',
    'dtype',
    'param_dtype',
    'moe.dispatch',
    'moe.capacity_factor',
    'moe.router.jitter',
}
# Said by `attention_layers` and `moe_layers`, layer by layer, in one way only.
_SAID_ELSEWHERE = {'attention', 'moe.first_dense_layers', 'moe.layer_step', 'moe.layers'}
_SHOWN = 8


def family_of(config: TransformerConfig) -> Family:
    """Returns the family whose published models a model can be one of, exactly.

    How it is computed is no matter (dtype, remat, scan, dispatch), nor is what only training sees.

    Args:
        config: the model's.

    Raises:
        InputError: where there is none; names the fields that stand in the way of the nearest.
    """
    found = [(obstacles(config, family), family) for family in FAMILIES]
    for standing, family in found:
        if not standing:
            return family
    standing, nearest = min(found, key=lambda pair: len(pair[0]))
    more = f'\n  and {len(standing) - _SHOWN} more' if len(standing) > _SHOWN else ''
    lines = '\n'.join(f'  {line}' for line in standing[:_SHOWN])
    raise InputError(
        f'No published family can express this model exactly. The nearest, {nearest.model_type}, '
        f'needs:\n{lines}{more}\nChange these fields before training, or leave the model '
        'unexported. moe.families has what each family can express.'
    )


def obstacles(config: TransformerConfig, family: Family) -> list[str]:
    """Says, field by field, what stands in the way of a model being one of a family's."""
    kinds = {type(kind) for kind in config.attention_layers}
    if kinds != {family.attention}:
        names = ', '.join(sorted(kind.__name__ for kind in kinds))
        # Far from the family, however few other fields differ.
        return [f'attention: of {family.attention.__name__}; here {names}', *[''] * 99]
    if family.experts is not None and family.experts != (config.moe is not None):
        return [f'moe: {"given" if family.experts else "None"}', *[''] * 9]
    lines = [
        f'{limit.field}: {limit.required}' for limit in family.limits if not limit.holds(config)
    ]
    try:
        read = family.read(Fields(family.write(config), 'config.json'))
    except InputError as error:
        return [*lines, str(error)]
    ours, theirs = (dict(_described(c)) for c in (config, read))
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return lines + [f'{n}={theirs.get(n)!r}; here {ours.get(n)!r}' for n in differing]


def _described(config: TransformerConfig) -> Iterator[tuple[str, Any]]:
    """Yields what a model computes, as names and plain values: equal for equal models."""
    moe_layers = config.moe_layers
    for name, value in _flat(config, ''):
        unread = name == 'mlp_dim' and all(moe_layers)
        if name not in _FREE | _SAID_ELSEWHERE and not unread:
            yield name, value
    yield 'moe.layers', [i for i, has_experts in enumerate(moe_layers) if has_experts]
    for i, kind in enumerate(config.attention_layers):
        yield from _flat(kind, f'attention[{i}].')


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        name, inner = prefix + field.name, getattr(value, field.name)
        if dataclasses.is_dataclass(inner) and name != 'attention':
            yield name, type(inner).__name__
            yield from _flat(inner, f'{name}.')
        else:
            yield name, inner
