"""How a model is trained, as frozen data. What it learns from is an `Objective`."""

import dataclasses

from moe.config import require


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """How a student's routers are kept balanced; every field is off at zero.

    Attributes:
        load_balance_weight: multiplies the load-balance loss (1.0 where perfectly balanced), averaged over
            the MoE layers and over tokens of each sequence.
        router_z_weight: multiplies the mean squared log-sum-exp of the router logits.
        selection_bias_rate: step of the loss-free bias update, after every optimizer step; needs
            `router.selection_bias`.
    """

    load_balance_weight: float = 0.0
    router_z_weight: float = 0.0
    selection_bias_rate: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value >= 0, f'balance.{field.name}', 'zero or more', value)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The host loop and the shape of one update.

    Attributes:
        steps: optimizer updates.
        micro_batches: equal parts that a batch is split into; their gradients add up to the whole batch's.
        chunk_size: tokens whose logits exist at one time in the fused loss.
        log_every: steps between rows of metrics.
        checkpoint_every: steps between checkpoints.
        keep_latest: checkpoints kept besides the best.
        max_skipped: updates in a row that may be skipped for a non-finite loss or gradient before the run
            stops.
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
