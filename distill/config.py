"""How a model is trained, as frozen data. What it learns from is an `Objective`."""

import dataclasses

from moe.balance import BiasRule, Scope
from moe.validation import one_of, require


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """How a student's routers are kept balanced; every weight and rate is off at zero.

    Attributes:
        load_balance_weight: multiplies the load-balance loss (1.0 where perfectly balanced),
            averaged over the MoE layers and over tokens.
        load_balance_scope: whose load a token is judged by: that of its 'sequence'; of its
            'micro_batch', over every shard, which alone depends on how a batch is split; or
            'global', of the whole batch, which costs a forward pass more where there are several
            micro-batches.
        router_z_weight: multiplies the mean squared log-sum-exp of the router logits.
        selection_bias_rate: step of the loss-free bias update, after every optimizer step; needs
            `router.selection_bias`.
        selection_bias_rule: 'sign' moves every expert by the rate; 'proportional' by the rate times
            its distance from the mean load, as a share of that mean.
    """

    load_balance_weight: float = 0.0
    load_balance_scope: Scope = 'sequence'
    router_z_weight: float = 0.0
    selection_bias_rate: float = 0.0
    selection_bias_rule: BiasRule = 'sign'

    def __post_init__(self) -> None:
        for name in ('load_balance_weight', 'router_z_weight', 'selection_bias_rate'):
            value = getattr(self, name)
            require(value >= 0, f'balance.{name}', 'zero or more', value)
        one_of('balance.load_balance_scope', self.load_balance_scope, Scope)
        one_of('balance.selection_bias_rule', self.selection_bias_rule, BiasRule)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The host loop and the shape of one update.

    Attributes:
        steps: optimizer updates.
        micro_batches: equal parts of a batch; their gradients add up to the whole batch's.
        chunk_size: tokens whose logits exist at one time in the fused loss.
        log_every: steps between rows of metrics.
        checkpoint_every: steps between checkpoints.
        keep_latest: checkpoints kept besides the best.
        max_skipped: updates in a row that may be skipped for a non-finite loss or gradient before
            the run stops.
    """

    steps: int
    micro_batches: int = 1
    chunk_size: int = 512
    log_every: int = 10
    checkpoint_every: int = 100
    keep_latest: int = 2
    max_skipped: int = 5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value > 0, f'train.{field.name}', 'a positive integer', value)
