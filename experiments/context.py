"""What the stages of one launch share: config, folder, mesh, text, tokens; made when needed."""

import dataclasses
import functools
import pathlib
from typing import Any, TypeVar

import ml_collections
from jax.sharding import Mesh

from distill import distributed
from distill.corpus import TokenCorpus, load_or_tokenize
from distill.counterpart import with_parallel
from distill.data import (
    DataConfig,
    EvaluationSet,
    TrainPipeline,
    evaluation_rows,
    fingerprint,
)
from distill.growing import GrowingPipeline
from distill.pretrained_tokenizer import PretrainedTokenizer
from distill.rollout import Rollout
from distill.target_stream import Pipeline
from distill.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_or_load
from distill.types import Batch
from experiments.documents import Documents
from experiments.fit import require_fit
from experiments.identity import model_identity
from experiments.panel_config import FurtherTeacherConfig
from experiments.signals import StopSignal
from experiments.study import StudyConfig, build_study
from experiments.teacher_config import TeacherConfig
from experiments.teacher_mesh import make_meshes
from experiments.tokenizers import folder_tokenizer
from experiments.workdir import Workdir
from experiments.writer_first import writer_first
from moe.config import TransformerConfig
from moe.errors import InputError
from moe.sharding import batch_sharding
from moe.transformer import Transformer

Saved = TypeVar('Saved', bound=Tokenizer)


class Context:
    """A study being run in a folder.

    Args:
        config: of the study; checked here, before anything is made.
        workdir: path of the folder.
        command: that repeats the launch, for the report.
        stop: asked to stop.
        json_path: where the report's figures are written too, as rows; None for nowhere.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: str,
        *,
        command: str,
        stop: StopSignal,
        json_path: pathlib.Path | None = None,
    ) -> None:
        self.study: StudyConfig = build_study(config)
        self.mesh, self.teacher_mesh = make_meshes(self.study.mesh, self.study.teacher.mesh)
        require_fit(self.study, self.mesh, self.teacher_mesh)
        self.workdir = Workdir(workdir, config, writer=distributed.is_writer())
        self.documents = Documents(
            self.study.data, self.study.seed, self.workdir.path, self.study.more_teachers or ()
        )
        self.values: dict[str, Any] = config.to_dict()
        self.command = command
        self.stop = stop
        self.json_path = json_path

    def model(self, config: TransformerConfig, mesh: Mesh | None = None) -> Transformer:
        """A model on this study's mesh, or another; on one device it needs none."""
        mesh = mesh or self.mesh
        return Transformer(config, mesh if mesh.size > 1 else None)

    @property
    def teacher_folder(self) -> pathlib.Path:
        """The stage that made the teacher, of this study or of another."""
        checkpoint = self.study.teacher.checkpoint
        return self.workdir.path / 'teacher' if checkpoint is None else pathlib.Path(checkpoint)

    def folder_of(self, teacher: TeacherConfig | FurtherTeacherConfig) -> pathlib.Path:
        """Where a teacher is."""
        own = teacher.checkpoint
        return self.teacher_folder if own is None else pathlib.Path(own)

    def _epoch_corpus(self, epoch: int) -> TokenCorpus:
        documents, tokenizer = self.documents.of_epoch(epoch), self.tokenizer
        folder = self.workdir.path / 'tokens'
        corpus = writer_first(
            lambda: load_or_tokenize(folder, documents, tokenizer), f'tokens of epoch {epoch}'
        )
        corpus = dataclasses.replace(corpus, routes=self.documents.routes(documents))
        across = self.study.student.cross_tokenizer
        if across is None:
            return corpus
        other = writer_first(
            lambda: load_or_tokenize(folder, documents, self.teacher_tokenizer),
            f"the teacher's tokens of epoch {epoch}",
        )
        length = self.study.data.seq_len
        return with_parallel(
            corpus,
            other,
            (tokenizer, self.teacher_tokenizer),
            row_lengths=(length, across.teacher_seq_len or 2 * length),
        )

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The student's: the teacher's where it comes from elsewhere; else bytes, or a trained BPE.

        With `student.cross_tokenizer`, that of what the student starts from.
        """
        data, teacher = self.study.data, self.study.teacher
        folder = self.workdir.path / 'tokenizer'
        source, checkpoint = self.study.tokenizer_source
        if source == 'hf':
            published = _published(str(checkpoint), self.study.vocab_size)
            return writer_first(lambda: _saved(published, folder), 'tokenizer')
        if teacher.source == 'remote' and teacher.remote.tokenizer is not None:
            own = folder_tokenizer(teacher.remote.tokenizer)
            return writer_first(lambda: _saved(own, folder), 'tokenizer')
        if checkpoint is not None:
            return load_tokenizer(pathlib.Path(checkpoint).parent / 'tokenizer')
        if data.tokenizer == 'byte':
            return writer_first(lambda: _saved(ByteTokenizer(), folder), 'tokenizer')
        texts = [document.text for document in self.documents.split[0]]
        return writer_first(lambda: train_or_load(folder, texts, data.vocab_size), 'tokenizer')

    @functools.cached_property
    def teacher_tokenizer(self) -> Tokenizer:
        """That of the teacher: the student's, but with `student.cross_tokenizer`."""
        teacher = self.study.teacher
        if self.study.student.cross_tokenizer is None:
            return self.tokenizer
        if teacher.source == 'hf':
            return _published(str(teacher.checkpoint), teacher.model.vocab_size)
        return load_tokenizer(self.teacher_folder.parent / 'tokenizer')

    @functools.cached_property
    def corpus(self) -> TokenCorpus:
        """The tokens of the train split; of the first epoch, where the text grows."""
        return self._epoch_corpus(0)

    @functools.cached_property
    def held_out(self) -> EvaluationSet:
        """The held-out documents that are evaluated, as rows."""
        return self._held_out(self.tokenizer)

    def read_by(self, name: str) -> tuple[Tokenizer, EvaluationSet]:
        """The tokenizer of a model of the study, and what is held out as it reads it."""
        if name == 'teacher' and self.study.student.cross_tokenizer is not None:
            return self.teacher_tokenizer, self._teacher_held_out
        return self.tokenizer, self.held_out

    @functools.cached_property
    def _teacher_held_out(self) -> EvaluationSet:
        return self._held_out(self.teacher_tokenizer)

    def _held_out(self, tokenizer: Tokenizer) -> EvaluationSet:
        data = self.study.data
        return evaluation_rows(
            self.documents.split[1], tokenizer, data.seq_len, max_documents=data.held_out_documents
        )

    @property
    def rollout(self) -> Rollout | None:
        """How rows are written while the student learns, with the tokenizer's own ids."""
        config = self.study.student.rollout
        if config is None:
            return None
        return Rollout(config, eos_id=self.tokenizer.eos_id, pad_id=self.tokenizer.pad_id)

    @property
    def batches(self) -> DataConfig:
        """How documents become batches."""
        data = self.study.data
        return DataConfig(data.seq_len, data.batch_size, self.study.seed)

    @property
    def data_fingerprint(self) -> dict[str, Any]:
        """What the sequence of batches depends on."""
        return fingerprint(self.corpus, self.batches)

    def pipeline(self) -> Pipeline:
        """A fresh stream of training batches, alike for every model of the study."""
        index, count = distributed.data_share(batch_sharding(self.mesh))
        share: Any = {'process_index': index, 'process_count': count}
        # Bad text is found out here, not at the first batch.
        corpus = self.corpus
        if self.documents.ledger is not None:
            return GrowingPipeline(self._epoch_corpus, self.batches, **share)
        return TrainPipeline(corpus, self.batches, **share)

    def training_rows(self, count: int) -> Batch:
        """The first rows of the train split in the study's order, whole on every process."""
        data = self.study.data
        return next(TrainPipeline(self.corpus, DataConfig(data.seq_len, count, self.study.seed)))

    def identity(self, config: TransformerConfig, *, teacher: bool = False) -> dict[str, Any]:
        """What a checkpoint of a student, or of a teacher, must agree with to be used here."""
        tokenizer = self.teacher_tokenizer if teacher else self.tokenizer
        return {'model': model_identity(config), 'tokenizer': tokenizer.fingerprint}


def require_room(ids: int, vocab_size: int, where: str) -> None:
    """Refuses a tokenizer with ids that its model has no embedding for."""
    if ids > vocab_size:
        raise InputError(
            f'The tokenizer of {where} must have ids below {vocab_size}, the vocabulary of its '
            f'model; its largest is {ids - 1}. Tokens were added that the model was not made for: '
            'use the tokenizer that belongs to it.'
        )


def _published(folder: str, vocab_size: int) -> PretrainedTokenizer:
    """The tokenizer of a published model."""
    tokenizer = PretrainedTokenizer(folder)
    require_room(tokenizer.vocab_size, vocab_size, folder)
    return tokenizer


def _saved(tokenizer: Saved, folder: pathlib.Path) -> Saved:
    """Puts the tokenizer where those who use this study's checkpoints look for it."""
    if not folder.exists():
        tokenizer.save(folder)
    return tokenizer
