"""The frozen description of a linear-attention layer."""

import dataclasses

from moe.errors import InputError


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig:
    """Kimi Delta Attention: a gated delta rule with one decay for each key channel.

    Attributes:
        num_heads: `H`; each has its own queries, keys, values and state.
        key_dim: `Dk` of one head's queries and keys.
        value_dim: `Dv` of one head's values; the state is [Dk, Dv] a head.
        gate_rank: inner width of the low-rank decay and output gates; the published models take the
            width of a head.
        conv_width: `W`, tokens under the short causal convolution of queries, keys and values, the
            current one among them.

    Source: arXiv 2510.26692, section 4.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    gate_rank: int
    conv_width: int = 4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 2 if field.name == 'conv_width' else 1
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < least:
                raise InputError(
                    f'linear_attention.{field.name} must be an integer of at least {least}; '
                    f'received {value!r}.'
                )
