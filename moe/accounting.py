"""Parameters, FLOPs and bytes, by formula from a config alone."""

import dataclasses
from collections.abc import Mapping

from moe.attention_cost import AttentionCost, attention_cost
from moe.config import DType, TransformerConfig
from moe.routing import RouterConfig
from moe.stacking import module_kind
from moe.validation import require

BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2}


@dataclasses.dataclass(frozen=True)
class ParameterReport:
    """How many parameters a model has, and how many of them act on one token.

    Attributes:
        total: all trained parameters. Selection biases are state, not parameters.
        active: as `total`, but with the `K` experts that one token chooses in place of all `E`, and
            without multi-token prediction, which the next token does not need. The embedding
            counts in full, as on the published models' cards.
        embedding: of both counts, the embedding table and, where it is not tied, the output head.
        by_part: `total` split into embedding, head, attention, norms, mlp, router, shared, experts,
            mtp (whole modules; embedding and head are the model's).
    """

    total: int
    active: int
    embedding: int
    by_part: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token; a multiply-add is two.

    Attributes:
        total: the sum of `by_part`.
        by_part: attention, attention_scores (with linear attention the products with its state),
            mlp, router, shared, experts, head, mtp.
    """

    total: int
    by_part: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class DecodeBytes:
    """Bytes read from memory to decode one token of a batch.

    Attributes:
        total: `weights + cache`.
        weights: the token's share of the weights that one step reads.
        cache: of the token's own context: keys and values, latents, states.
    """

    total: float
    weights: float
    cache: float


def parameter_report(config: TransformerConfig) -> ParameterReport:
    """Counts total and active parameters.

    Args:
        config: the model.

    Returns:
        The counts; they equal those of the initialized model exactly.
    """
    weights, biases = _matrices(config), _biases(config)
    parts = {
        'embedding': config.vocab_size * config.embed_dim,
        'head': 0 if config.tie_embeddings else weights['head'],
        'attention': weights['attention'] + biases['attention'],
        'norms': _norm_scales(config),
        **{name: weights[name] for name in ('mlp', 'shared')},
        'router': weights['router'] + biases['router'],
        'experts': weights['experts'] + biases['experts'],
        'mtp': config.mtp_depth * _module_parameters(config) if config.mtp_depth else 0,
    }
    total = sum(parts.values())
    chosen = 0 if config.moe is None else _chosen(config.moe.router, parts['experts'])
    return ParameterReport(
        total=total,
        active=total - parts['experts'] + chosen - parts['mtp'],
        embedding=parts['embedding'] + parts['head'],
        by_part=parts,
    )


def flops_per_token(
    config: TransformerConfig, *, context_length: int, causal: bool = True, mtp: bool = False
) -> Flops:
    """Counts the forward pass of one token, averaged over a sequence.

    Every matrix product counts 2 for each weight that acts on the token: attention projections, the
    gated MLP, the router, the shared expert, the `K` chosen experts, the head. Scores and their
    product with the values add `4 H Dh` for each key that a query attends to (latent attention
    `2 H (key + value channels)`): `(T + 1) / 2` of them on average, fewer in a window. Linear
    attention adds `6 H Dk Dv`, the products of its recurrence. Norms, RoPE, softmax, activations,
    biases and the embedding's look-up, which are not products, count nothing.

    Args:
        config: the model.
        context_length: `T`, tokens in the sequence, at least 1.
        causal: False counts all `T` keys a query, as an implementation does that masks the full
            `T x T` scores. This package's leaves out most of what is masked, in blocks: XLA's
            count of it lies between the two, and at `T` of one block equals the latter.
        mtp: counts the multi-token-prediction modules too, each with its layer and the head.

    Returns:
        Forward FLOPs per token, rounded down to whole ones.

    Raises:
        InputError: where `context_length` is below 1.
    """
    require(context_length >= 1, 'context_length', 'at least 1', context_length)
    parts = {name: 2 * size for name, size in _matrices(config).items()}
    if config.moe is not None:
        router = config.moe.router
        # Soft experts compute their slots, whatever the number of tokens.
        soft = router.choice == 'soft'
        parts['experts'] = (
            parts['experts'] * router.slots // context_length
            if soft
            else _chosen(router, parts['experts'])
        )
    scores = 0
    for cost in _attention_costs(config):
        pairs = cost.pairs(context_length) if causal else context_length**2
        scores += cost.flops_per_key * pairs + cost.state_flops * context_length
    parts['attention_scores'] = scores // context_length
    parts['mtp'] = 0
    if mtp and config.mtp_depth:
        alone = flops_per_token(_module(config), context_length=context_length, causal=causal)
        parts['mtp'] = config.mtp_depth * (alone.total + 2 * _projection(config))
    return Flops(total=sum(parts.values()), by_part=parts)


def bytes_per_token(
    config: TransformerConfig,
    *,
    batch: int,
    context_length: int,
    param_dtype: DType | None = None,
    cache_dtype: DType | None = None,
) -> DecodeBytes:
    """Counts the bytes read to decode one token, in a step that decodes one for each of `batch`.

    A step reads every weight that acts on any of its tokens once, so that the tokens share them. Of
    `E` experts, `E (1 - (1 - K/E)^B)` are expected to be chosen by at least one of `B` tokens where
    every expert is as likely and tokens choose independently: `K` for one token, nearing `E` for
    many. Of the embedding a token reads one row; a head, tied or not, is read whole. Writes and
    activations are not counted.

    Args:
        config: the model.
        batch: `B`, sequences decoded together, at least 1.
        context_length: tokens of each sequence, at least 1; a window reads the last of them.
        param_dtype: of the stored weights; default the config's.
        cache_dtype: of keys, values and latents; default the config's activations'. The states of
            linear attention are float32.

    Returns:
        Bytes per token.

    Raises:
        InputError: where a count is below 1, or a dtype is not known.
    """
    require(batch >= 1, 'batch', 'at least 1', batch)
    require(context_length >= 1, 'context_length', 'at least 1', context_length)
    weights, biases = _matrices(config), _biases(config)
    experts_read = 0.0
    if config.moe is not None:
        router = config.moe.router
        chosen = 1 - (1 - router.experts_per_token / router.num_experts) ** batch
        experts_read = (weights['experts'] + biases['experts']) * chosen
    shared_read = sum(weights.values()) - weights['experts']
    shared_read += biases['attention'] + biases['router']
    shared_read += _norm_scales(config)
    elements = (shared_read + experts_read) / batch + config.embed_dim
    cached, states = 0, 0
    for cost in _attention_costs(config):
        cached += cost.cached_per_token * cost.seen(context_length) + cost.cached_inputs
        states += cost.state
    weight_bytes = elements * _bytes(param_dtype or config.param_dtype)
    cache_bytes = float(cached * _bytes(cache_dtype or config.dtype) + states * BYTES['float32'])
    return DecodeBytes(weight_bytes + cache_bytes, weight_bytes, cache_bytes)


def _module(config: TransformerConfig) -> TransformerConfig:
    """Returns a model of one layer, of the kind that multi-token-prediction modules have."""
    kind = module_kind(config)
    moe = config.moe if kind.has_experts else None
    if moe is not None:
        moe = dataclasses.replace(moe, layers=(0,))
    return dataclasses.replace(config, num_layers=1, attention=kind.attention, moe=moe, mtp_depth=0)


def _module_parameters(config: TransformerConfig) -> int:
    """Counts a module: a layer and the final norm, two more norms, and the projection."""
    alone = parameter_report(_module(config))
    return alone.total - alone.embedding + 2 * config.embed_dim + _projection(config)


def _projection(config: TransformerConfig) -> int:
    return 2 * config.embed_dim**2


def _attention_costs(config: TransformerConfig) -> tuple[AttentionCost, ...]:
    """Counts every layer's attention."""
    return tuple(attention_cost(kind, config.embed_dim) for kind in config.attention_layers)


def _matrices(config: TransformerConfig) -> dict[str, int]:
    """Elements of every matrix that multiplies activations, summed over layers."""
    D, moe = config.embed_dim, config.moe
    moe_layers = sum(config.moe_layers)
    sizes = {
        'head': D * config.vocab_size,
        'attention': sum(cost.matrices for cost in _attention_costs(config)),
        'mlp': (config.num_layers - moe_layers) * 3 * D * config.mlp_dim,
        'router': 0,
        'shared': 0,
        'experts': 0,
    }
    if moe is not None:
        sizes['router'] = moe_layers * D * _router_outputs(moe.router)
        sizes['shared'] = moe_layers * 3 * D * moe.shared_dim
        sizes['experts'] = moe_layers * moe.router.num_experts * 3 * D * moe.expert_dim
    return sizes


def _router_outputs(router: RouterConfig) -> int:
    return router.num_experts * (router.slots if router.choice == 'soft' else 1)


def _biases(config: TransformerConfig) -> dict[str, int]:
    """Elements of the learnt vectors of attention, routers and experts, summed over layers."""
    sizes, moe = {'attention': 0, 'router': 0, 'experts': 0}, config.moe
    sizes['attention'] = sum(cost.vectors for cost in _attention_costs(config))
    if moe is not None and moe.router.bias:
        sizes['router'] = sum(config.moe_layers) * _router_outputs(moe.router)
    if moe is not None and moe.bias:
        one_expert = 2 * moe.expert_dim + config.embed_dim
        sizes['experts'] = sum(config.moe_layers) * moe.router.num_experts * one_expert
    return sizes


def _chosen(router: RouterConfig, all_experts: int) -> int:
    """Of what all `E` experts have, the part of the `K` that one token passes."""
    return all_experts // router.num_experts * router.experts_per_token


def _norm_scales(config: TransformerConfig) -> int:
    of_stream = 4 if config.post_norms else 2
    of_attention = sum(cost.norm_scales for cost in _attention_costs(config))
    return (config.num_layers * of_stream + 1) * config.embed_dim + of_attention


def _bytes(dtype: str) -> int:
    require(dtype in BYTES, 'A dtype', f'one of {", ".join(BYTES)}', dtype)
    return BYTES[dtype]
