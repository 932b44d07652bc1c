"""How a model is trained, as frozen data. What it learns from is an `Objective`."""

import dataclasses
import math

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


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Which sequences of a batch are written by a model, and how.

    Attributes:
        lmbda: share of the sequences that the student writes, in [0, 1]; exact over the steps, and
            in each step within one sequence.
        teacher_share: share that the teacher writes, likewise; both together at most 1. The others
            stay as the text has them.
        temperature: divides the logits that are drawn from; 0 takes the likeliest token.
        max_new_tokens: of a sequence; a prompt has at most `seq_len - max_new_tokens`.
        replay_share: of steps, in which the student's sequences are drawn from those that it wrote
            in the steps before, rather than written; in [0, 1).
        staleness: steps that a sequence is kept for at most; 0 keeps none.

    Source: GKD, arXiv 2306.13649, algorithm 1, where a whole batch is the student's with
        probability `lmbda`; here each batch has its share. Replay: DistiLLM, arXiv 2402.03898,
        section 3.2, where the share and the buffer's age are adapted; here they are stated.
    """

    lmbda: float = 0.5
    teacher_share: float = 0.0
    temperature: float = 1.0
    max_new_tokens: int = 128
    replay_share: float = 0.0
    staleness: int = 0

    def __post_init__(self) -> None:
        for name in ('lmbda', 'teacher_share', 'replay_share'):
            value = getattr(self, name)
            require(0 <= value <= 1, f'rollout.{name}', 'a share, in [0, 1]', value)
        # Shares such as 0.7 and 0.3 may sum to a little more than 1.
        together = round(self.lmbda + self.teacher_share, 6)
        require(together <= 1, 'rollout.lmbda + rollout.teacher_share', 'at most 1', together)
        drawn = math.isfinite(self.temperature) and self.temperature >= 0
        require(drawn, 'rollout.temperature', 'zero (greedy) or more', self.temperature)
        count = self.max_new_tokens
        require(count > 0, 'rollout.max_new_tokens', 'a positive integer', count)
        share = self.replay_share
        require(share < 1, 'rollout.replay_share', 'below 1, so that something is written', share)
        require(
            self.staleness > 0 if share > 0 else self.staleness == 0,
            'rollout.staleness',
            'a positive integer with a replay_share above 0, else 0',
            self.staleness,
        )

    def require_room(self, seq_len: int) -> None:
        """Refuses completions that leave a row no room for a prompt."""
        require(
            self.max_new_tokens < seq_len,
            'rollout.max_new_tokens',
            f'below data.seq_len={seq_len}, so that a prompt has a token at least',
            self.max_new_tokens,
        )
