"""A study as frozen dataclasses, built from its ConfigDict before anything runs."""

import dataclasses
import os
from typing import Any, Literal

import ml_collections

from distill.across import CrossTokenizer
from distill.config import BalanceConfig, RolloutConfig, TrainConfig
from distill.cost import chip_price
from distill.estimators import SampledEstimator, TopKEstimator
from distill.feature_checks import require_comparable
from distill.features import Feature, feature_names
from distill.mtp_loss import require_weight
from distill.objective import Objective, Term
from distill.optimizer import OptimizerConfig, learning_rate_schedule
from distill.pairs import require_sound
from distill.provenance import PUBLISHED, Provenance, require_permission
from distill.schedules import Schedule, ever_positive
from distill.tokenizer import ByteTokenizer
from distill.writers import require_writers
from experiments.across_checks import own_vocab_sizes, require_two_tokenizers
from experiments.architectures import own_architecture, published_start, published_teacher
from experiments.build import build
from experiments.exam_config import ExamConfig
from experiments.init_config import InitConfig
from experiments.panel_config import FurtherTeacherConfig, require_together
from experiments.quantise_config import QuantiseConfig
from experiments.remote_checks import require_askable, require_text_alone
from experiments.remote_config import RemoteConfig
from experiments.teacher_mesh import require_separable
from experiments.teacher_parts import require_partable
from experiments.tokenizers import folder_tokenizer
from moe.config import TransformerConfig, require
from moe.errors import InputError
from moe.routing import require_causal
from moe.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Which text, how it becomes tokens and how tokens become batches.

    Attributes:
        source: 'python', a path or glob, or a folder of `.jsonl` logs that may grow.
        field: of a row of .jsonl, .parquet or ArrayRecord; or a text in which each `{name}` stands
            for that of a field.
        filter: of a folder of logs: the installed filter that takes out what is personal; None for
            none. See `experiments.filters`.
        allow_unlicensed: of a folder of logs: whether rows without a licence are trained on.
        route_field: of a row, whose text names its teacher, one of `more_teachers`; any other text
            is the first teacher's. None lets all teach all.
        max_bytes: of text that is read, whole documents at a time.
        tokenizer: 'byte', or 'bpe', trained once on the train split.
        vocab_size: entries of the 'bpe' tokenizer.
        held_out_fraction: of the documents.
        held_out_source: text of its own to hold out, as `source` but no folder, instead of that
            fraction; what of it is in `source` too is not trained on. None for none.
        held_out_field: of its rows; None for `field`.
        held_out_documents: evaluated at most.
        seq_len: tokens of a row.
        batch_size: rows of a batch, over all hosts.
    """

    source: str
    field: str
    filter: str | None
    allow_unlicensed: bool
    max_bytes: int
    tokenizer: Literal['bpe', 'byte']
    vocab_size: int
    held_out_fraction: float
    held_out_documents: int
    seq_len: int
    batch_size: int
    held_out_source: str | None = None
    held_out_field: str | None = None
    route_field: str | None = None

    def __post_init__(self) -> None:
        for name in ('max_bytes', 'vocab_size', 'held_out_documents', 'seq_len', 'batch_size'):
            require(getattr(self, name) > 0, f'data.{name}', 'positive', getattr(self, name))
        fraction = self.held_out_fraction
        require(0 < fraction < 1, 'data.held_out_fraction', 'between 0 and 1', fraction)
        if self.held_out_field is not None and self.held_out_source is None:
            raise InputError(
                'data.held_out_field is of the rows of data.held_out_source; received '
                f'{self.held_out_field!r} and None. Name the source too, or leave the field out.'
            )

    @property
    def model_vocab_size(self) -> int:
        """`V` of every model of the study."""
        return ByteTokenizer().vocab_size if self.tokenizer == 'byte' else self.vocab_size


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
        if self.source == 'remote':
            self._require_remote()
            return
        # One's own is declared by where it comes from; what is declared besides must allow it.
        known = PUBLISHED if self.source == 'hf' else OWN_TEACHER
        require_permission(self.provenance.filled(known), 'The teacher')
        if self.checkpoint is not None:
            object.__setattr__(self, 'checkpoint', os.path.expanduser(self.checkpoint))
        _require_causal(self.model)
        if self.source == 'train':
            learning_rate_schedule(self.optimizer, self.train.steps)
            require_weight(self.model, self.objective())
            moe = self.model.moe
            if moe is not None and moe.router.selection_bias:
                raise InputError(
                    "model.moe.router.selection_bias must be False for source='train': training "
                    'the teacher never moves the biases. Set it to False.'
                )

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
        _require_causal(self.model)
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


def _require_causal(model: TransformerConfig) -> None:
    if model.moe is not None:
        require_causal(model.moe.router, 'A study, which compares models that read left to right,')


_NEVER_CACHED = {
    'hidden': "it is larger than the teacher's work",
    'truncated': "'top_k' keeps what it leaves out",
    'text': 'it is the data',
}


@dataclasses.dataclass(frozen=True)
class TargetsConfig:
    """What the student is given of its teacher.

    Attributes:
        kind: 'hidden' (everything), 'top_k' (the likeliest ids and the mass of the rest),
            'sampled' (ids drawn from the teacher), 'truncated' (the likeliest ids as if they were
            all: biased, to be compared with) or 'text' (what it wrote, which is the data).
        cached: whether a stage writes targets for any number of students, that then need no
            teacher; else it runs beside the student. Not of kind 'hidden'.
        path: another study's folder of targets, to read them rather than write them.
        steps: batches of training whose targets are written; None for the student's own steps.
        temperature: divides the teacher's logits; that of the terms it is used in. Of 'hidden', 1.
        k: ids of 'top_k' and 'truncated'.
        draws: of 'sampled', of each token; None finds the number that gives `distinct` ids.
        distinct: ids of a token, on average over the first batch.
        proposal_temperature: divides the logits once more to draw; draws are then weighed.
        rows_per_shard: rows of a file; as many are lost at most when a writer is killed.
    """

    kind: Literal['hidden', 'top_k', 'sampled', 'truncated', 'text']
    cached: bool
    path: str | None
    steps: int | None
    temperature: float
    k: int
    draws: int | None
    distinct: float
    proposal_temperature: float
    rows_per_shard: int

    def __post_init__(self) -> None:
        if self.cached and self.kind in _NEVER_CACHED:
            raise InputError(
                "targets.kind must be 'top_k' or 'sampled' where targets.cached=True; received "
                f'{self.kind!r}, which is not written: {_NEVER_CACHED[self.kind]}. Choose one, '
                'or set cached=False.'
            )
        if not self.cached and (self.path is not None or self.steps is not None):
            raise InputError(
                'targets.path and targets.steps need targets.cached=True; received False. Set it, '
                'or leave them out.'
            )
        if self.kind == 'hidden':
            require(
                self.temperature == 1,
                'targets.temperature',
                "1 for kind='hidden', whose terms have their own",
                self.temperature,
            )
        TopKEstimator(self.k, self.temperature)
        SampledEstimator(
            1 if self.draws is None else self.draws, self.temperature, self.proposal_temperature
        )
        require(self.distinct >= 1, 'targets.distinct', 'at least 1', self.distinct)
        for name in ('steps', 'rows_per_shard'):
            value = getattr(self, name)
            require(value is None or value > 0, f'targets.{name}', 'positive', value)
        if self.path is not None:
            object.__setattr__(self, 'path', os.path.expanduser(self.path))


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
    """

    batch_size: int
    context_length: int
    prefill_batch: int
    chip: str
    prompts: tuple[str, ...]
    sample_documents: int
    sample_tokens: int
    temperature: float

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
