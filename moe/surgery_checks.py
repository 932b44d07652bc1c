"""What a method of surgery can make of a source, told from the configs alone.

Each takes `(source, target, **options)` and raises an `InputError` that names the field.
"""

from typing import Any

from moe.config import AttentionLike, TransformerConfig
from moe.densify import dense_width, require_mergeable
from moe.errors import InputError
from moe.fewer_experts import routed_moe
from moe.merge import require_one_group
from moe.pruning import require_fewer_heads, require_narrower
from moe.upcycle import require_upcyclable

MEASURES = ('frequency', 'weight', 'activation')


def copied(source: TransformerConfig, target: TransformerConfig) -> None:
    """Lets through whatever the method's free fields did."""


def upcycled(
    source: TransformerConfig,
    target: TransformerConfig,
    *,
    noise: float,
    router: str,
    router_std: float,
) -> None:
    """Requires experts that add up to the dense MLP."""
    if target.moe is None:
        raise InputError("'upcycle' needs a target with experts; its moe is None.")
    _require_choice('router', router, ('drawn', 'centroids'))
    require_upcyclable(source, target.moe, noise=noise, router_std=router_std)


def pruned(source: TransformerConfig, target: TransformerConfig) -> None:
    """Requires a narrower or shallower target, with attention of the same kinds.

    Which layers stay is measured: only then is it known which attention each layer has.
    """
    require_narrower(source, target)
    if target.num_layers > source.num_layers:
        raise InputError(
            f'Pruning can only take layers away: num_layers is {source.num_layers}; received '
            f'{target.num_layers}.'
        )
    for kind in dict.fromkeys(target.attention_layers):
        _require_some_layer(source, kind)


def with_experts_pruned(source: TransformerConfig, target: TransformerConfig, *, by: str) -> None:
    """Requires fewer experts."""
    _require_fewer(source, target)
    _require_choice('by', by, MEASURES)


def with_experts_merged(
    source: TransformerConfig, target: TransformerConfig, *, by: str, similarity: str
) -> None:
    """Requires fewer experts, in one group."""
    _require_fewer(source, target)
    _require_choice('by', by, MEASURES)
    _require_choice('similarity', similarity, ('outputs', 'weights'))
    require_one_group(routed_moe(source))


def with_experts_averaged(source: TransformerConfig, target: TransformerConfig) -> None:
    """Requires a dense target of the width of one expert and the shared one."""
    require_mergeable(source)
    _require_width(target, dense_width(source, 1))


def with_experts_concatenated(source: TransformerConfig, target: TransformerConfig) -> None:
    """Requires a dense target as wide as the shared expert and some number of the others."""
    require_mergeable(source)
    _require_width(target, dense_width(source, concatenated_count(source, target)))


def concatenated_count(source: TransformerConfig, target: TransformerConfig) -> int:
    """Counts the experts whose hidden units fill the target's MLP, beside the shared expert's."""
    moe = source.moe
    assert moe is not None
    fitting = (target.mlp_dim - moe.shared_dim) // moe.expert_dim
    return min(max(1, fitting), moe.router.num_experts)


def _require_some_layer(source: TransformerConfig, kind: AttentionLike) -> None:
    """Requires a layer whose heads can be pruned down to a kind of attention."""
    refusals = []
    for old in dict.fromkeys(source.attention_layers):
        try:
            return require_fewer_heads(old, kind)
        except InputError as error:
            refusals.append(error)
    raise refusals[0]


def _require_fewer(source: TransformerConfig, target: TransformerConfig) -> None:
    if target.moe is None:
        raise InputError('Experts can be pruned or merged in a model that has some; it is dense.')
    most, asked = routed_moe(source).router.num_experts, target.moe.router.num_experts
    if asked > most:
        raise InputError(
            f'moe.router.num_experts must be at most the {most} of the source; received {asked}.'
        )


def _require_width(target: TransformerConfig, width: int) -> None:
    if target.moe is not None or target.mlp_dim != width:
        raise InputError(
            f'These experts make a dense model of mlp_dim={width}; the target has '
            f'mlp_dim={target.mlp_dim} and moe={target.moe}. Set them so.'
        )


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f'{name} must be one of {", ".join(choices)}; received {value!r}.')
