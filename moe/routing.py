"""Routers: a spec as data, and scores, choice and weights as one pure function of the logits.

This file is all that knows one router from another. What it hands on, ids and weights, is the same
for each, so a new router is a `Choice`, its fields in `RouterConfig` and its branch in `route`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.errors import InputError
from moe.validation import one_of, positive, require

Choice = Literal['token', 'expert', 'hash', 'soft']
ScoreFunction = Literal['softmax', 'sigmoid']
Normalize = Literal['none', 'before', 'after']

# Fields that one choice alone reads: elsewhere they must keep their defaults.
_READ_BY = {'selection_bias': 'token', 'num_groups': 'token', 'hash_seed': 'hash', 'slots': 'soft'}


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Which experts see which tokens, as data.

    The router computes `s = score(x @ W + b)` in float32. With choice

    - 'token' each token takes the `K` experts with the largest `s + selection_bias`. Switch is
      `K = 1` with `normalize='none'`;
    - 'expert' each expert takes its `ceil(n K / E)` best of the `n` unmasked tokens in a row, so
      that load is even and a token has between none and `E` experts;
    - 'hash' the token's id alone says which `K` experts it takes;
    - 'soft' each expert computes `slots` weighted means of the tokens of a row, and each token
      takes a weighted mean of all slots; `score` and `normalize` play no part.

    Weights are `s` of the chosen, never the biased score. With 'expert' and 'soft' what one token
    passes depends on the tokens after it: fine for an encoder, a study or a layer trained to be
    replaced, but the model cannot decode token by token, and its training loss looks ahead. Caches
    and exports refuse them: see `require_causal`.

    Attributes:
        num_experts: `E`.
        experts_per_token: `K`, at most `E`; on average with 'expert', and `E` with 'soft'.
        score: 'softmax' over the experts, or an elementwise 'sigmoid'.
        normalize: 'none' takes the scores as they are; 'before' divides each score by the sum over
            all `E` experts before the choice (softmax scores are so already); 'after' divides the
            chosen weights by their sum over the `K` chosen (`norm_topk_prob` elsewhere; a softmax
            over the `K` chosen logits is a 'softmax' with 'after').
        scale: multiplies the weights after any normalisation (`routed_scaling_factor` elsewhere).
        eps: added to the sum that 'before' and 'after' divide by.
        selection_bias: whether loss-free balancing keeps a bias per expert, in the `routing`
            variables; 'token' alone.
        choice: who chooses, see above.
        num_groups: of equally many experts, in order; a token's experts come from `groups_kept` of
            them, those with the largest sum of their best two biased scores. 'token' alone.
        groups_kept: at most `num_groups`; together they hold at least `K` experts.
        bias: whether the logits have a learnt bias `b` per expert.
        jitter: the layer's input is multiplied, elementwise, by noise that is uniform in
            [1 - jitter, 1 + jitter]; in [0, 1). Only where an rng named 'jitter' is given:
            evaluation gives none.
        hash_seed: which of the hash functions; 'hash' alone.
        slots: of each expert in each row; 'soft' alone.

    Source: Switch and its jitter arXiv 2101.03961; groups DeepSeek-V3, arXiv 2412.19437; expert
        choice arXiv 2202.09368, here per row rather than over the batch; hash arXiv 2106.04426;
        soft arXiv 2308.00951, without its normalisation of tokens and slots.
    """

    num_experts: int
    experts_per_token: int
    score: ScoreFunction = 'softmax'
    normalize: Normalize = 'after'
    scale: float = 1.0
    eps: float = 1e-20
    selection_bias: bool = False
    choice: Choice = 'token'
    num_groups: int = 1
    groups_kept: int = 1
    bias: bool = False
    jitter: float = 0.0
    hash_seed: int = 0
    slots: int = 1

    def __post_init__(self) -> None:
        counts = ('num_experts', 'experts_per_token', 'num_groups', 'groups_kept', 'slots')
        for name in counts:
            positive(f'router.{name}', getattr(self, name))
        one_of('router.score', self.score, ScoreFunction)
        one_of('router.normalize', self.normalize, Normalize)
        one_of('router.choice', self.choice, Choice)
        experts, k = self.num_experts, self.experts_per_token
        where = 'router.experts_per_token'
        require(k <= experts, where, f'at most num_experts={experts}', k)
        soft = "num_experts with choice='soft': a token passes every expert"
        require(self.choice != 'soft' or k == experts, where, soft, k)
        require(self.scale > 0, 'router.scale', 'positive', self.scale)
        require(self.eps >= 0, 'router.eps', 'zero or more', self.eps)
        require(0 <= self.jitter < 1, 'router.jitter', 'in [0, 1)', self.jitter)
        for field in dataclasses.fields(self):
            reader, value = _READ_BY.get(field.name, self.choice), getattr(self, field.name)
            valid = reader == self.choice or value == field.default
            required = f'{field.default!r} unless choice={reader!r}, which alone reads it'
            require(valid, f'router.{field.name}', required, value)
        self._check_groups()

    def _check_groups(self) -> None:
        experts, groups, kept = self.num_experts, self.num_groups, self.groups_kept
        require(kept <= groups, 'router.groups_kept', f'at most num_groups={groups}', kept)
        if groups == 1:
            return
        required = f'a divisor of num_experts={experts} that leaves two or more experts a group'
        valid = experts % groups == 0 and experts // groups >= 2
        require(valid, 'router.num_groups', required, groups)
        held = kept * (experts // groups)
        required = (
            f'enough groups for experts_per_token={self.experts_per_token}: these hold {held} '
            'experts'
        )
        require(held >= self.experts_per_token, 'router.groups_kept', required, kept)

    @property
    def causal(self) -> bool:
        """Whether what a token passes depends on no later token."""
        return self.choice in ('token', 'hash')


def require_causal(config: RouterConfig, use: str) -> None:
    """Raises an `InputError` where routing looks ahead, for a use that cannot: `use` names it."""
    if not config.causal:
        raise InputError(
            f'{use} needs routing that no later token changes; received '
            f"router.choice={config.choice!r}. Train with 'token' or 'hash', or run whole "
            'sequences without a cache.'
        )


def router_scores(
    router_logits: Float[Array, 'B T E'], score: ScoreFunction
) -> Float[Array, 'B T E']:
    """Scores every expert in float32.

    Args:
        router_logits: unbounded, any float type.
        score: 'softmax' over the experts, or an elementwise 'sigmoid'.

    Returns:
        Scores in [0, 1], float32; a softmax's sum to 1.
    """
    logits = router_logits.astype(jnp.float32)
    return jax.nn.softmax(logits, axis=-1) if score == 'softmax' else jax.nn.sigmoid(logits)


def route(
    router_logits: Float[Array, 'B T E'],
    config: RouterConfig,
    *,
    selection_bias: Float[Array, 'E'] | None = None,
    mask: Bool[Array, 'B T'] | None = None,
    tokens: Int[Array, 'B T'] | None = None,
) -> tuple[Int[Array, 'B T K'], Float[Array, 'B T K']]:
    """Chooses experts for each token and weighs them.

        s = score(logits)                      float32
        s = s / (sum over E of s + eps)        normalize='before'
        ids = the choice, from s               ties go to the lowest id
        w = s[ids]
        w = w / (sum over K of w + eps)        normalize='after'
        weights = scale * w

    The bias takes part in the choice alone: weights and their gradients never see it.

    Args:
        router_logits: one row a token.
        config: the router as data; its choice is not 'soft', which has no ids.
        selection_bias: added to the scores before the choice, any real value; None for zeros.
        mask: True for tokens that compete for experts; None for all. 'expert' alone reads it.
        tokens: ids of the vocabulary; 'hash' alone reads them.

    Returns:
        `(expert_ids, expert_weights)`, best first; ids int32, weights float32. With 'expert' there
        are `E` columns, those past a token's experts with id `E`, which stands for none, and
        weight 0: dispatch and `expert_load` leave them out.

    Raises:
        InputError: where 'hash' gets no tokens.

    Source: DeepSeek-V3 (arXiv 2412.19437, eqs. 12 to 16), Auxiliary-loss-free balancing (arXiv
        2408.15664, eq. 3); with `selection_bias=None`, Mixtral's and OLMoE's softmax routers.
    """
    scores = _normalized_scores(router_logits, config)
    selection = jax.lax.stop_gradient(scores)
    if config.choice == 'token':
        if selection_bias is not None:
            selection = selection + jax.lax.stop_gradient(selection_bias).astype(jnp.float32)
        ids = choose_by_token(selection, config)
    elif config.choice == 'expert':
        everything = jnp.ones(selection.shape[:2], bool)
        ids = choose_by_expert(selection, everything if mask is None else mask, config)
    elif config.choice == 'hash':
        ids = choose_by_hash(tokens, config)
    else:
        raise ValueError(f'choice={config.choice!r} weighs slots; see moe.soft_moe')
    return ids, _weights_of(scores, ids, config)


def weigh(
    router_logits: Float[Array, 'B T E'], expert_ids: Int[Array, 'B T K'], config: RouterConfig
) -> Float[Array, 'B T K']:
    """Weighs experts that were chosen elsewhere, as `route` weighs its own.

    Args:
        router_logits: one row a token.
        expert_ids: in [0, E], `E` for none; distinct for each token.
        config: the router as data; its choice is not read.

    Returns:
        The weights, float32, in the order of the ids; 0 for none.
    """
    return _weights_of(_normalized_scores(router_logits, config), expert_ids, config)


def _normalized_scores(router_logits: Array, config: RouterConfig) -> Float[Array, 'B T E']:
    scores = router_scores(router_logits, config.score)
    if config.normalize == 'before':
        scores = scores / (scores.sum(axis=-1, keepdims=True) + config.eps)
    return scores


def _weights_of(
    scores: Float[Array, 'B T E'], ids: Int[Array, 'B T K'], config: RouterConfig
) -> Float[Array, 'B T K']:
    # A select instead of a gather: its transpose is a sum, not a scatter.
    chosen = ids[..., None] == jnp.arange(config.num_experts)
    weights = jnp.where(chosen, scores[..., None, :], 0.0).sum(axis=-1)
    if config.normalize == 'after':
        weights = weights / (weights.sum(axis=-1, keepdims=True) + config.eps)
    return config.scale * weights


def choose_by_token(selection: Float[Array, 'B T E'], config: RouterConfig) -> Int[Array, 'B T K']:
    """Takes each token's `K` largest, of the kept groups where there are groups.

    Experts of other groups become -inf rather than 0: a biased score can be negative.
    """
    if config.num_groups > 1:
        groups = selection.reshape(*selection.shape[:-1], config.num_groups, -1)
        best_two = jax.lax.top_k(groups, 2)[0].sum(axis=-1)
        _, kept = jax.lax.top_k(best_two, config.groups_kept)
        is_kept = (kept[..., None] == jnp.arange(config.num_groups)).any(axis=-2)
        groups = jnp.where(is_kept[..., None], groups, -jnp.inf)
        selection = groups.reshape(selection.shape)
    return jax.lax.top_k(selection, config.experts_per_token)[1]


def choose_by_expert(
    selection: Float[Array, 'B T E'], mask: Bool[Array, 'B T'], config: RouterConfig
) -> Int[Array, 'B T E']:
    """Takes each expert's `ceil(n K / E)` largest of a row's `n` unmasked tokens.

    A row by itself: nothing depends on how the batch is split over devices or micro-batches.
    """
    experts, k = config.num_experts, config.experts_per_token
    quota = -(-mask.sum(axis=1) * k // experts)
    order = jnp.argsort(jnp.where(mask[..., None], -selection, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    chosen = rank < quota[:, None, None]
    best, ids = jax.lax.top_k(jnp.where(chosen, selection, -jnp.inf), experts)
    return jnp.where(best > -jnp.inf, ids, experts)


def choose_by_hash(tokens: Int[Array, 'B T'] | None, config: RouterConfig) -> Int[Array, 'B T K']:
    """Takes the `K` experts for which a hash of (token id, expert, seed) is largest.

    Rendezvous hashing: distinct experts, each as likely, and no table of the vocabulary to store.
    """
    if tokens is None:
        raise InputError(
            "router.choice='hash' routes by token id; received no tokens. Pass them to the layer: "
            'MoELayer(...)(x, mask, tokens).'
        )
    seed = jnp.uint32(config.hash_seed % 2**32)
    by_token = _mix(tokens.astype(jnp.uint32) + _mix(seed))
    hashes = _mix(by_token[..., None] + jnp.arange(config.num_experts, dtype=jnp.uint32))
    # Signed, of which every platform sorts: another order, as good.
    return jax.lax.top_k(jax.lax.bitcast_convert_type(hashes, jnp.int32), config.experts_per_token)[
        1
    ]


def _mix(x: Array) -> Array:
    """Spreads each bit of a uint32 over all: the finaliser `lowbias32`, a bijection."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def expert_load(
    expert_ids: Int[Array, 'B T K'], mask: Bool[Array, 'B T'], num_experts: int
) -> Float[Array, 'E']:
    """Counts the unmasked assignments of each expert.

    Args:
        expert_ids: in [0, num_experts); `num_experts` for none.
        mask: True counts.
        num_experts: `E`.

    Returns:
        Assignments per expert, float32, summed over the whole (global) batch.
    """
    chosen = expert_ids[..., None] == jnp.arange(num_experts)
    counted = jnp.where(mask[..., None, None], chosen, False)
    return counted.sum(axis=tuple(range(counted.ndim - 1)), dtype=jnp.int32).astype(jnp.float32)
