"""How a student is trained on to be quantised, as data."""

import dataclasses

from distill.config import TrainConfig
from distill.mtp_loss import require_weight
from distill.objective import Objective, Term
from distill.optimizer import OptimizerConfig, learning_rate_schedule
from distill.schedules import Schedule
from moe.config import TransformerConfig
from moe.quantised import Weights
from moe.quantising import matrix_shapes
from moe.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class QuantiseConfig:
    """The stage 'quantise': from the student, taught by the student, seen as it will be served.

    Attributes:
        weights: what its matrices are quantised to, a key of `moe.quantised.FORMATS`.
        optimizer: a rate far below the student's own: it is near already.
        train: for how long.
    """

    weights: Weights
    optimizer: OptimizerConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        learning_rate_schedule(self.optimizer, self.train.steps)

    def objective(self, mtp_weight: float | Schedule) -> Objective:
        """The KL from the student in floats; that over tokens further ahead as it was trained."""
        return Objective((Term('forward_kl'),), mtp_weight)

    def require_quantisable(self, model: TransformerConfig, mtp_weight: float | Schedule) -> None:
        """Refuses students whose matrices cannot be quantised.

        Raises:
            InputError: where its experts are stored one by one.
        """
        require_weight(model, self.objective(mtp_weight))
        matrix_shapes(Transformer(model))
