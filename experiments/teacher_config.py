"""The teacher of a study, as a config."""

import dataclasses
import os
from typing import Literal

from distill.config import TrainConfig
from distill.mtp_loss import require_weight
from distill.objective import Objective, Term
from distill.optimizer import OptimizerConfig, learning_rate_schedule
from distill.provenance import PUBLISHED, Provenance, require_permission
from distill.schedules import Schedule
from experiments.causal import require_left_to_right
from experiments.remote_config import RemoteConfig
from moe.config import TransformerConfig, require
from moe.errors import InputError
from moe.quantised import Weights
from moe.quantising import matrix_shapes
from moe.sharding import MeshConfig
from moe.transformer import Transformer

OWN_TEACHER = Provenance('trained in this study', 'its weights', "its owner's", True)


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A teacher trained in this run, a checkpoint, a published model, a server, or the student.

    Attributes:
        source: 'train', 'checkpoint', 'hf' or 'remote'; or 'ema', the average of the student's own
            parameters over its updates, whose architecture is then the student's.
        checkpoint: the folder of a stage that trained it, or, with 'hf', of a published model, as
            `transformers` saves it; `~` is the home folder.
        dtype: of the frozen teacher's parameters and activations.
        provenance: its declaration; a teacher of one's own needs none, a published one needs its
            licence and whether that permits training, a remote one all of it.
        remote: how a remote one is reached; nothing below it is read then.
        model: its architecture; with 'hf' that of the folder, whatever the config says here.
        optimizer: how it is trained; read where source='train', as is the next.
        train: for how long.
        mtp_weight: of its loss over tokens further ahead, with `model.mtp_depth`.
        ema_decay: of the average, with source='ema': after each update it is `ema_decay` times
            itself and the rest the new parameters; in [0, 1).
        weight: in the loss, beside those of `more_teachers`; positive.
        micro_batches: equal parts of a batch that it reads one after the other while it teaches;
            None for those of the student.
        mesh: of the last devices, on which it teaches alone; None to share those of the student.
            All else that it does is done on `config.mesh`.
        weights: what its matrices are quantised to while it teaches, a key of
            `moe.quantised.FORMATS`; None for floats of its dtype, with which all else is done.
    """

    source: Literal['train', 'checkpoint', 'hf', 'remote', 'ema']
    checkpoint: str | None
    dtype: Literal['float32', 'bfloat16']
    provenance: Provenance
    remote: RemoteConfig
    model: TransformerConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mtp_weight: float | Schedule = 0.0
    ema_decay: float = 0.999
    weight: float = 1.0
    micro_batches: int | None = None
    mesh: MeshConfig | None = None
    weights: Weights | None = None

    @property
    def own_decay(self) -> float | None:
        """That of the student's average; None where another model teaches."""
        return self.ema_decay if self.source == 'ema' else None

    def __post_init__(self) -> None:
        require(0 <= self.ema_decay < 1, 'teacher.ema_decay', 'in [0, 1)', self.ema_decay)
        require(self.weight > 0, 'teacher.weight', 'positive', self.weight)
        if (self.source in ('train', 'remote', 'ema')) != (self.checkpoint is None):
            raise InputError(
                "config.teacher.checkpoint is a trained stage's folder and goes with "
                "source='checkpoint', or a published model's and goes with source='hf'; received "
                f'source={self.source!r} and checkpoint={self.checkpoint!r}.'
            )
        if self.weights is not None:
            self._require_quantisable()
        if self.source == 'remote':
            self._require_remote()
            return
        # One's own is declared by where it comes from; what is declared besides must allow it.
        known = PUBLISHED if self.source == 'hf' else OWN_TEACHER
        require_permission(self.provenance.filled(known), 'The teacher')
        if self.checkpoint is not None:
            object.__setattr__(self, 'checkpoint', os.path.expanduser(self.checkpoint))
        require_left_to_right(self.model)
        if self.source == 'train':
            learning_rate_schedule(self.optimizer, self.train.steps)
            require_weight(self.model, self.objective())
            moe = self.model.moe
            if moe is not None and moe.router.selection_bias:
                raise InputError(
                    "model.moe.router.selection_bias must be False for source='train': training "
                    'the teacher never moves the biases. Set it to False.'
                )

    def _require_quantisable(self) -> None:
        """Refuses one whose weights are not here, move, or are stored expert by expert."""
        if self.source in ('remote', 'ema'):
            raise InputError(
                f'config.teacher.weights quantises a frozen model that is here; source='
                f'{self.source!r} has none. Leave one of them out.'
            )
        matrix_shapes(Transformer(self.model))

    def _require_remote(self) -> None:
        """Refuses a server that is not named, or whose model is not declared."""
        for name in ('base_url', 'model'):
            if getattr(self.remote, name) is None:
                raise InputError(
                    f"config.teacher.remote.{name} is required for source='remote': the address "
                    "of the server, such as 'https://host/v1', and the model as it calls it."
                )
        require_permission(
            self.provenance, f'The remote teacher {self.remote.model!r} at {self.remote.base_url}'
        )

    def objective(self) -> Objective:
        """What a teacher trained here learns: the text."""
        return Objective((Term('cross_entropy'),), self.mtp_weight)
