"""Targets on disk: their bytes, the rate at which they are read, and what writing them costs.

A teacher is trained on the text for a while, so that its targets are those of a model that knows
something of it; one that knows more has fewer ids to tell and smaller files.
"""

import functools
import itertools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jaxtyping import Array

from distill.cache import CachedTargets, TargetsWriter, make_manifest
from distill.estimators import Estimator, SampledEstimator, TopKEstimator, draws_for
from distill.teacher import EstimatedTeacher, OnlineTeacher
from distill.timing import interleaved_medians
from distill.types import Batch
from experiments.benchmark_row import Row, ratio_row, this_machine
from experiments.benchmark_text import CHUNK, Sizes, text_batches, trained_teacher, training
from moe.transformer import Transformer

# Name, unit, value, reference, and what that is.
Measured = tuple[str, str, float, float, str]

# Bytes of a token on disk that are asked for, and ids of it.
ASKED = {'sampled': 36.0, 'top_k': 160.0}
DISTINCT, TOP = 12.0, 64


def cache_rows(
    source: str = 'python',
    sizes: Sizes = Sizes(),  # noqa: B008  frozen
    *,
    repeats: int = 3,
) -> Iterator[Row]:
    """Measures targets of real text, sampled ones and the likeliest with the mass of the rest.

    Args:
        source: of the text, as config.data.source.
        sizes: of text, models and batches.
        repeats: timed rounds; the median counts.

    Returns:
        For each form of targets a row of the bytes that a token takes on disk, all files counted,
        against those that are asked for; and one of the tokens per second that are read, from
        memory where the system keeps the files, against those that a student trains on. Of the
        sampled ones also the milliseconds that a batch takes to be drawn, against the teacher's
        forward pass to its log-probabilities alone; and to be drawn and written, against the same
        without writing.
    """
    pipeline, tokenizer = text_batches(source, sizes)
    teacher, variables, cross_entropy = trained_teacher(pipeline, sizes)
    batches = list(itertools.islice(pipeline, sizes.batches))
    hidden = jax.jit(OnlineTeacher(teacher).targets)(variables, batches[0])
    draws = draws_for(DISTINCT, hidden, batches[0])
    conditions = (
        f'text {source!r}, V={sizes.vocab_size}, teacher D={sizes.width}, L=2, trained for '
        f'{sizes.steps} steps to {cross_entropy:.2f} nats a token; {sizes.batches} batches of '
        f'{sizes.rows} rows of {sizes.length} tokens; {this_machine()}; '
    )
    estimators: dict[str, Estimator] = {
        'sampled': SampledEstimator(draws),
        'top_k': TopKEstimator(min(TOP, sizes.vocab_size)),
    }
    forms = {'sampled': f'{draws} draws, {DISTINCT:.0f} distinct', 'top_k': f'{TOP} ids and tail'}
    for kind, estimator in estimators.items():
        stage = _Stage(teacher, variables, estimator, tokenizer, batches, sizes)
        measured = [*_disk(stage, ASKED[kind], repeats)]
        if kind == 'sampled':
            measured += _passes(stage, repeats)
        for name, unit, value, reference, against in measured:
            told = f'{conditions}{forms[kind]}; reference: {against}'
            yield ratio_row(f'cache/{name}/{kind}', unit, value, reference, told)


class _Stage:
    """The stage `targets` of some batches."""

    def __init__(
        self,
        teacher: Transformer,
        variables: Any,
        estimator: Estimator,
        tokenizer: str,
        batches: Sequence[Batch],
        sizes: Sizes,
    ) -> None:
        self.teacher, self.variables, self.batches = OnlineTeacher(teacher), variables, batches
        self.sizes = sizes
        self._estimate = jax.jit(EstimatedTeacher(self.teacher, estimator).targets)
        self._manifest = make_manifest(
            estimator,
            vocab_size=sizes.vocab_size,
            seq_len=sizes.length,
            teacher={},
            tokenizer=tokenizer,
            data={},
        )

    def estimates(self) -> Iterator[tuple[Batch, Any]]:
        """Gives each batch and its targets, which may still be in the making."""
        for batch in self.batches:
            yield batch, self._estimate(self.variables, batch)

    def write(self, folder: pathlib.Path) -> None:
        """Writes all, each batch while the device works on the next."""
        writer = TargetsWriter(folder, self._manifest)
        pending: list[tuple[Batch, Any]] = []
        for made in self.estimates():
            pending.append(made)
            if len(pending) > 1:
                _add(writer, *pending.pop(0))
        for made in pending:
            _add(writer, *made)
        writer.close()


def _add(writer: TargetsWriter, batch: Batch, said: Any) -> None:
    writer.add(batch, jax.device_get(said))


def _disk(stage: _Stage, asked: float, repeats: int) -> list[Measured]:
    """What a token takes on disk, and how fast it is read."""
    batches = stage.batches
    with tempfile.TemporaryDirectory() as folder:
        stage.write(pathlib.Path(folder))
        files = [path for path in pathlib.Path(folder).rglob('*') if path.is_file()]
        tokens = sum(int((batch.segment_ids > 0).sum()) for batch in batches)
        size = sum(path.stat().st_size for path in files) / tokens
        reader = CachedTargets(folder, {})
        functions: Any = {
            'read': lambda: [reader.read(batch) for batch in batches],
            'train': training(reader, batches[0], stage.sizes),
        }
        seconds = interleaved_medians(functions, repeats=repeats)
    count = batches[0].tokens.size
    rates = count * len(batches) / seconds['read'], count / seconds['train']
    return [
        ('bytes', 'B', size, asked, 'what is asked for'),
        ('read', 'token/s', *rates, 'a student of 30M parameters that trains on them'),
    ]


def _passes(stage: _Stage, repeats: int) -> list[Measured]:
    """What a batch takes: the teacher's forward pass, with estimates, and written too."""
    forward = jax.jit(functools.partial(_normalizers, stage.teacher))
    with tempfile.TemporaryDirectory() as parent:
        folders = (pathlib.Path(parent, str(number)) for number in itertools.count())
        seconds = interleaved_medians(
            {
                'forward': lambda: [forward(stage.variables, batch) for batch in stage.batches],
                'estimate': lambda: list(stage.estimates()),
                'write': lambda: stage.write(next(folders)),
            },
            repeats=repeats,
        )
    each = {name: 1e3 * of_all / len(stage.batches) for name, of_all in seconds.items()}
    return [
        ('estimate', 'ms', each['estimate'], each['forward'], "the teacher's forward pass"),
        ('write', 'ms', each['write'], each['estimate'], 'the same without writing'),
    ]


def _normalizers(teacher: OnlineTeacher, variables: Any, batch: Batch) -> Array:
    """The forward pass up to each token's log of the sum over the vocabulary, in chunks."""
    targets = teacher.targets(variables, batch)
    chunks = targets.hidden.reshape(-1, _chunk(batch), targets.hidden.shape[-1])
    return jax.lax.map(lambda chunk: jax.nn.logsumexp(chunk @ targets.head, axis=-1), chunks)


def _chunk(batch: Batch) -> int:
    return min(CHUNK, batch.tokens.size)
