"""The student of a study, and its twin without a teacher, as configs."""

import dataclasses

from distill.across import CrossTokenizer
from distill.config import BalanceConfig, RolloutConfig, TrainConfig
from distill.features import Feature
from distill.mtp_loss import require_weight
from distill.objective import Objective, Term
from distill.optimizer import OptimizerConfig, learning_rate_schedule
from distill.schedules import Schedule, ever_positive
from distill.writers import require_writers
from experiments.causal import require_left_to_right
from experiments.init_config import InitConfig
from moe.config import TransformerConfig
from moe.errors import InputError


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """A student and how it is taught; `terms` are its objective's, under names of one's own.

    `mtp_weight` weighs them over tokens further ahead, where `model.mtp_depth` is above 0.
    `rollout` tells which sequences a model writes while the student learns; None for none.
    `return_weight` weighs what a token does to those after it in what the student writes.
    `features` are what is matched inside of both, under names of one's own.
    `cross_tokenizer` tells how it learns from a teacher with another tokenizer; None where it has
    the same.
    """

    model: TransformerConfig
    init: InitConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    balance: BalanceConfig
    terms: dict[str, Term]
    mtp_weight: float | Schedule = 0.0
    rollout: RolloutConfig | None = None
    return_weight: float = 0.0
    features: dict[str, Feature] | None = None
    cross_tokenizer: CrossTokenizer | None = None

    def __post_init__(self) -> None:
        require_weight(self.model, self.objective())
        require_writers(self.objective(), self.rollout)
        rate, moe = self.balance.selection_bias_rate, self.model.moe
        if rate > 0 and (moe is None or not moe.router.selection_bias):
            raise InputError(
                f'balance.selection_bias_rate={rate} needs model.moe.router.selection_bias=True; '
                'set it, or set the rate to 0.'
            )
        for name in ('load_balance_weight', 'router_z_weight'):
            weight = getattr(self.balance, name)
            if weight > 0 and moe is None:
                raise InputError(
                    f'balance.{name}={weight} needs routers, and model.moe is None; give the model '
                    'experts, or set the weight to 0.'
                )
        require_left_to_right(self.model)
        learning_rate_schedule(self.optimizer, self.train.steps)

    def objective(self) -> Objective:
        """The weighted sum of the terms."""
        return Objective(
            tuple(self.terms.values()),
            self.mtp_weight,
            self.return_weight,
            tuple((self.features or {}).values()),
            self.cross_tokenizer,
        )

    def require_taught(self) -> None:
        """Refuses terms that learn nothing from what a teacher says of the text."""
        objective = self.objective()
        across = () if objective.across is None else (objective.across,)
        taught = [term for term in objective.terms if term.needs_teacher]
        if not any(ever_positive(it.weight) for it in (*taught, *objective.features, *across)):
            received = ', '.join(f'{t.name} (weight {t.weight})' for t in self.terms.values())
            raise InputError(
                'terms must hold a divergence from the teacher whose weight is not always zero, or '
                'features one of its features; '
                f'received {received}. '
                "Add one, such as dict(name='forward_kl', weight=1.0)."
            )


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """What the student's twin learns from instead: the text alone, no teacher."""

    terms: dict[str, Term]

    def __post_init__(self) -> None:
        if self.objective().needs_teacher:
            raise InputError('config.control.terms must need no teacher; keep cross_entropy alone.')
        require_writers(self.objective(), None)

    def objective(self) -> Objective:
        """The weighted sum of the terms."""
        return Objective(tuple(self.terms.values()))
