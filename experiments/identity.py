"""What a model computes, as a checkpoint notes it down."""

import dataclasses
import json
from typing import Any

from moe.config import TransformerConfig


def model_identity(config: TransformerConfig) -> dict[str, Any]:
    """Returns the architecture, without how it is computed, as JSON gives it back."""
    architecture = dataclasses.asdict(config)
    for name in ('dtype', 'param_dtype', 'remat'):
        del architecture[name]
    if architecture['moe'] is not None:
        for name in ('dispatch', 'capacity_factor', 'exchange_factor', 'exchange_chunks'):
            del architecture['moe'][name]
    return json.loads(json.dumps(architecture))  # lists for tuples
