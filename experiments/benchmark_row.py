"""A figure of a benchmark: what was measured, against what, and under which conditions."""

import platform
from typing import Any

import jax

Row = dict[str, Any]


def ratio_row(name: str, unit: str, value: float, reference: float, conditions: str) -> Row:
    """Returns a figure; of milliseconds the ratio is that of the rates, `reference / value`."""
    return {
        'name': name,
        'value': value,
        'unit': unit,
        'reference': reference,
        'ratio': reference / value if unit == 'ms' else value / reference,
        'conditions': conditions,
    }


def this_machine() -> str:
    """Names the device, the machine and the version of jax."""
    return f'{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}'
