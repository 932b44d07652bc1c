"""A study as frozen dataclasses, built from its ConfigDict before anything runs."""

import dataclasses
import os
from typing import Any

import ml_collections

from distill.config import TrainConfig
from distill.cost import chip_price
from distill.feature_checks import require_comparable
from distill.features import feature_names
from distill.pairs import require_sound
from experiments.across_checks import own_vocab_sizes, require_two_tokenizers
from experiments.architectures import own_architecture, published_start, published_teacher
from experiments.build import build
from experiments.exam_config import ExamConfig
from experiments.panel_config import FurtherTeacherConfig, require_together
from experiments.quantise_config import QuantiseConfig
from experiments.remote_checks import require_askable, require_text_alone
from experiments.student_config import ControlConfig, StudentConfig
from experiments.targets_config import TargetsConfig
from experiments.teacher_config import TeacherConfig
from experiments.teacher_mesh import require_separable
from experiments.teacher_parts import require_partable
from experiments.text_config import TextConfig
from experiments.tokenizers import folder_tokenizer
from moe.config import require
from moe.errors import InputError
from moe.quantised import Weights
from moe.quantising import matrix_shapes
from moe.sharding import MeshConfig
from moe.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is measured of every model, on the held-out text and on this machine.

    Attributes:
        batch_size: rows of an evaluation batch.
        context_length: tokens; of the FLOPs and bytes that a token costs.
        prefill_batch: rows of the throughput measurement.
        chip: whose price per hour is charged.
        prompts: of the samples of text.
        sample_documents: held-out documents whose beginnings are prompts too.
        sample_tokens: written after each prompt.
        temperature: of the samples.
        weights: keys of `moe.quantised.FORMATS`, in which the student is measured too; needs one
            device.
    """

    batch_size: int
    context_length: int
    prefill_batch: int
    chip: str
    prompts: tuple[str, ...]
    sample_documents: int
    sample_tokens: int
    temperature: float
    weights: tuple[Weights, ...] = ()

    def __post_init__(self) -> None:
        for name in ('batch_size', 'context_length', 'prefill_batch', 'sample_tokens'):
            require(getattr(self, name) > 0, f'evaluate.{name}', 'positive', getattr(self, name))
        require(bool(self.prompts), 'evaluate.prompts', 'at least one text', self.prompts)
        documents = self.sample_documents
        require(documents >= 0, 'evaluate.sample_documents', 'zero or more', documents)
        require(self.temperature >= 0, 'evaluate.temperature', 'zero or more', self.temperature)
        chip_price(self.chip)


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Everything that the stages need, checked."""

    seed: int
    data: TextConfig
    mesh: MeshConfig
    teacher: TeacherConfig
    targets: TargetsConfig
    student: StudentConfig
    control: ControlConfig
    evaluate: EvaluateConfig
    exams: ExamConfig
    more_teachers: dict[str, FurtherTeacherConfig] | None = None
    quantise: QuantiseConfig | None = None

    @property
    def has_control(self) -> bool:
        """A student that learns from text alone, as its control does, would be its own."""
        return self.targets.kind != 'text'

    @property
    def quantised_kinds(self) -> tuple[Weights, ...]:
        """In which the student is measured: those asked for, and that which it is trained for."""
        trained = () if self.quantise is None else (self.quantise.weights,)
        return tuple(dict.fromkeys((*self.evaluate.weights, *trained)))

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """How each stage that trains does so, by the name that its config has."""
        trainings = {'teacher': self.teacher.train, 'student': self.student.train}
        return trainings | ({} if self.quantise is None else {'quantise': self.quantise.train})

    @property
    def target_steps(self) -> int:
        """Batches of training whose targets are written."""
        return self.targets.steps or self.student.train.steps

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        """Whose tokenizer the student has: a source and a checkpoint, of teacher or start."""
        across = self.student.cross_tokenizer is not None
        whose = self.student.init if across else self.teacher
        return whose.source, whose.checkpoint

    @property
    def vocab_size(self) -> int:
        """`V` of the student, and of all where there is no `student.cross_tokenizer`."""
        return self.student.model.vocab_size

    def __post_init__(self) -> None:
        require(
            self.target_steps >= self.student.train.steps,
            'targets.steps',
            f'at least student.train.steps={self.student.train.steps}, or None',
            self.target_steps,
        )
        for name, train in self.trainings.items():
            require(
                self.data.batch_size % train.micro_batches == 0,
                f'{name}.train.micro_batches',
                f'a divisor of data.batch_size={self.data.batch_size}',
                train.micro_batches,
            )
        if self.student.cross_tokenizer is not None:
            require_two_tokenizers(self)
        if self.teacher.micro_batches is not None:
            require_partable(self)
        if self.teacher.mesh is not None:
            require_separable(self)
        if self.teacher.source == 'ema':
            self._require_own_average()
        require_together(
            self.more_teachers,
            route_field=self.data.route_field,
            kind=self.targets.kind,
            source=self.teacher.source,
            on_policy=self.student.rollout is not None,
        )
        # What a checkpoint holds is found out when there is a mesh and text to ask it with.
        init = self.student.init
        if self.teacher.source == 'remote':
            require_askable(self)
        elif not init.is_random and init.source == 'teacher':
            init.require_reachable(self.teacher.model, self.student.model)
        targets = self.targets
        if self.student.rollout is not None:
            self.student.rollout.require_room(self.data.seq_len)
            if targets.cached or self.teacher.source == 'remote':
                raise InputError(
                    'student.rollout needs a teacher that runs beside the student, to judge what '
                    f'was not written before; received targets.cached={targets.cached}, '
                    f'teacher.source={self.teacher.source!r}. Set cached=False and take a teacher '
                    'whose weights are here, or leave the rollout out.'
                )
        self._require_features()
        self.exams.require_asked_of(self.tokenizer_source[1] or self.teacher.remote.tokenizer)
        if self.evaluate.weights:
            matrix_shapes(Transformer(self.student.model))
        if self.quantise is not None:
            self.quantise.require_quantisable(self.student.model, self.student.mtp_weight)
        if self.student.return_weight > 0 and targets.kind != 'hidden':
            raise InputError(
                f'student.return_weight={self.student.return_weight} needs all that the teacher '
                f"says: targets.kind='hidden'; received {targets.kind!r}. Set it, or the weight to "
                '0.'
            )
        if targets.kind == 'text':
            require_text_alone(self)
            return
        self.student.require_taught()
        require_sound(
            self.student.objective().terms,
            'top_k' if targets.kind == 'truncated' else targets.kind,
            temperature=targets.temperature,
            kept=targets.k if targets.kind in ('top_k', 'truncated') else self.vocab_size,
        )

    def _require_features(self) -> None:
        """Refuses what is matched inside of a teacher that is not there, or has nothing such."""
        features = self.student.objective().features
        if not features:
            return
        names = ', '.join(feature_names(features))
        required = f"'hidden' with student.features ({names}): others say nothing of the inside"
        require(self.targets.kind == 'hidden', 'targets.kind', required, self.targets.kind)
        if self.more_teachers:
            raise InputError(
                f'student.features ({names}) are matched to one teacher; received '
                f'{len(self.more_teachers)} more. Leave them out, or more_teachers.'
            )
        require_comparable(features, self.student.model, self.teacher.model)

    def _require_own_average(self) -> None:
        """Refuses what needs a teacher before there is a student."""
        init = self.student.init
        if not init.is_random and init.source == 'teacher':
            raise InputError(
                "student.init.source='teacher' needs a teacher that is there before the student; "
                "received teacher.source='ema'. Start at random, or from a checkpoint."
            )
        if self.targets.kind != 'hidden':
            raise InputError(
                "teacher.source='ema' changes with every update, and says all it has to say: "
                f"targets.kind='hidden'; received {self.targets.kind!r}. Set it."
            )


def build_study(config: ml_collections.ConfigDict) -> StudyConfig:
    """Builds and checks the whole study.

    Raises:
        InputError: for an unknown or missing key, a wrong type, or values that cannot go together;
            names the path of the key.
    """
    values = config.to_dict()
    published = published_teacher(values.get('teacher'))
    published_start(values)
    own_architecture(values)
    more = values.get('more_teachers')
    others = list(more.values()) if isinstance(more, dict) else []
    for part in others:
        published_teacher(part)
    if isinstance(values.get('data'), dict):
        data_size = build(TextConfig, values['data'], 'config.data').model_vocab_size
        vocab_size = data_size if published is None else published.vocab_size
        vocab_size = _remote_vocab_size(values) or vocab_size
        sizes = own_vocab_sizes(values, data_size)
        parts = {who: values.get(who) for who in ('teacher', 'student')}
        if isinstance(more, dict):
            parts |= {f'more_teachers.{name}': part for name, part in more.items()}
        for who, part in parts.items():
            _set_vocab_size(part, who, sizes.get(who, vocab_size))
    return build(StudyConfig, values, 'config')


def _remote_vocab_size(values: dict[str, Any]) -> int | None:
    """Reads how many ids a remote teacher's tokenizer has, where the config names its folder."""
    part = values.get('teacher')
    if not isinstance(part, dict) or part.get('source') != 'remote':
        return None
    remote = part.get('remote')
    folder = remote.get('tokenizer') if isinstance(remote, dict) else None
    if not isinstance(folder, str):
        return None
    return folder_tokenizer(os.path.expanduser(folder)).vocab_size


def _set_vocab_size(part: Any, who: str, vocab_size: int) -> None:
    """Gives a model the vocabulary that the tokenizer has; leaves a malformed config to `build`."""
    model = part.get('model') if isinstance(part, dict) else None
    if isinstance(model, dict):
        if 'vocab_size' in model:
            raise InputError(
                f"config.{who}.model.vocab_size is the tokenizer's; set config.data.vocab_size."
            )
        model['vocab_size'] = vocab_size
