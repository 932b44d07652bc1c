"""What one update of a student is made of, and the state before the first."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill.config import BalanceConfig, TrainConfig
from distill.feature_match import require_features
from distill.foreign_teacher import require_foreign
from distill.mtp_loss import require_weight
from distill.objective import Objective
from distill.panel import TeacherPanel, require_panel
from distill.partwise import PartwiseTeacher
from distill.projectors import initial_projectors, projector_shapes
from distill.rollout import Rollout, initial_replay
from distill.teacher import OnlineTeacher, Teacher
from distill.types import TrainState
from distill.writers import require_writers
from moe.errors import InputError
from moe.qk_clip import require_clippable
from moe.routing import require_causal
from moe.transformer import Transformer
from moe.validation import require

# Folded into a seed that steps are folded into as well: beyond any of them.
_PROJECTOR_KEY = 2**31 + 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What one update of a student is made of.

    Attributes:
        model: the trained model.
        objective: the terms of its loss.
        optimizer: the optimizer chain.
        train: micro-batches and chunk size.
        balance: weights of the routers' losses and the rate of the bias update.
        teacher: where targets come from; None where no term needs them.
        seed: of the routers' jitter. The noise follows from it, the step and the micro-batch, so a
            resumed run draws the same; it is the one thing that a split into micro-batches changes
            whatever the balance.
        qk_clip: after each update, heads whose largest attention logit of the step exceeded this
            are clipped, see `moe.qk_clip.clip_heads`; None for no clip, and no measurement.
        rollout: how rows are written anew before each update; None where all is text.
        ema_decay: of the student's own average, which then is the teacher; in [0, 1). None for
            another teacher.
        seen: makes of the trained parameters those that the model is run with, such as
            `distill.straight_through` does; None for themselves.
    """

    model: Transformer
    objective: Objective
    optimizer: optax.GradientTransformation
    train: TrainConfig
    balance: BalanceConfig
    teacher: Teacher | None = None
    seed: int = 0
    qk_clip: float | None = None
    rollout: Rollout | None = None
    ema_decay: float | None = None
    seen: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        moe, balance = self.model.config.moe, self.balance
        biased = moe is not None and moe.router.selection_bias
        if balance.selection_bias_rate > 0 and not biased:
            raise InputError(
                f'selection_bias_rate={balance.selection_bias_rate} needs a model whose routers '
                'have selection_bias=True; received one without. Set it, or set the rate to 0.'
            )
        if self.qk_clip is not None:
            require(self.qk_clip > 0, 'qk_clip', 'positive, or None', self.qk_clip)
            require_clippable(self.model.config)
        require_weight(self.model.config, self.objective)
        if self.ema_decay is not None:
            require(0 <= self.ema_decay < 1, 'ema_decay', 'in [0, 1), or None', self.ema_decay)
            if getattr(self.teacher, 'model', None) != self.model:
                raise InputError(
                    'A student taught by its own average needs a teacher of its own architecture; '
                    f'received {self.teacher!r}. Give OnlineTeacher(model).'
                )
        require_features(self.objective.features, self.model.config, self.teacher)
        if isinstance(self.teacher, TeacherPanel):
            require_panel(
                self.teacher, writes=self.rollout is not None, ahead=self.objective.uses_mtp
            )
        require_writers(self.objective, self.rollout and self.rollout.config)
        require_foreign(self.objective, self.teacher, writes=self.rollout is not None)
        if self.rollout is not None:
            self._require_authors(self.rollout)
        own = self.teacher
        whole = own.teacher if isinstance(own, PartwiseTeacher) else own
        if self.objective.return_weight > 0 and not isinstance(whole, OnlineTeacher):
            raise InputError(
                'return_weight needs the whole distribution of a teacher that runs beside the '
                f'student; received {type(whole).__name__}. Use targets of kind hidden.'
            )

    def forward_params(self, params: Any) -> Any:
        """Returns the parameters that the model is run with."""
        return params if self.seen is None else self.seen(params)

    @property
    def projectors(self) -> dict[str, Any]:
        """The shapes of what is trained beside the model, see `distill.projector_shapes`."""
        if not (self.objective.features or self.objective.dual):
            return {}
        teacher: Any = self.teacher
        both = self.model.config, teacher.model.config
        return projector_shapes(self.objective.features, *both, dual=self.objective.dual)

    def _require_authors(self, rollout: Rollout) -> None:
        """Refuses writers that cannot write, and a teacher that cannot judge what is new."""
        author = getattr(self.teacher, 'model', None)
        if self.teacher is not None and author is None:
            raise InputError(
                'Sequences that a model writes in training need a teacher that runs beside the '
                f'student; received {type(self.teacher).__name__}, who spoke before they were '
                'written. Use an online teacher, or leave the rollout out.'
            )
        if rollout.config.teacher_share > 0 and author is None:
            raise InputError(
                f'rollout.teacher_share={rollout.config.teacher_share} needs a teacher; received '
                'none. Set it to 0, or give one.'
            )
        for model in (self.model, author):
            if model is not None and model.config.moe is not None:
                require_causal(model.config.moe.router, 'Writing sequences in training')


def initial_state(
    recipe: Recipe, variables: dict[str, Any], shape: tuple[int, int] | None = None
) -> TrainState:
    """Returns the state before the first update of the given (unboxed) variables.

    Projectors of the objective's features are drawn, from the recipe's seed.

    Args:
        recipe: of the updates.
        variables: 'params' and, where there are any, 'routing'.
        shape: rows and tokens of a batch; needed where what the student writes is kept.
    """
    replay = None
    if recipe.rollout is not None and recipe.rollout.config.staleness > 0:
        if shape is None:
            raise ValueError('a rollout with staleness needs the shape of its batches')
        replay = initial_replay(recipe.rollout.config, *shape)
    routing = variables.get('routing', {})
    own = {'params': variables['params'], 'routing': routing}
    key = jax.random.fold_in(jax.random.key(recipe.seed), _PROJECTOR_KEY)
    params = {**variables['params'], **initial_projectors(recipe.projectors, key)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        routing=routing,
        opt_state=recipe.optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
        replay=replay,
        # A copy: what is donated to an update may not stand in two places.
        ema=None if recipe.ema_decay is None else jax.tree.map(jnp.copy, own),
    )
