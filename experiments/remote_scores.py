"""The targets stage of a remote teacher: its log-probabilities of the student's batches, once.

Everything is asked first and kept in WORKDIR/targets/ledger.jsonl, which survives a kill; then the
same batches are walked again, and what was said of their rows is written as any other targets are.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from distill.answer_ledger import AnswerLedger
from distill.asking import RemoteError, ask_all
from distill.budget import in_words
from distill.cache import CachedTargets, TargetsWriter, make_manifest
from distill.estimators import TopKEstimator
from distill.formats import jsonl_records
from distill.loop import Stopped
from distill.provenance import require_permission
from distill.remote import Request
from distill.remote_targets import (
    Piece,
    Scoring,
    assemble,
    pieces_of,
    score_reader,
    score_request,
    silent_positions,
)
from distill.token_names import TokenNames
from distill.token_scores import TopRows
from distill.types import Batch
from experiments.context import Context
from experiments.remote_config import RemoteConfig
from experiments.teacher_config import TeacherConfig
from experiments.tokenizers import remote_tokenizer
from experiments.watch import progress_line
from experiments.written_scores import WrittenScores
from moe.errors import InputError

LEDGER = 'ledger.jsonl'
Facts = dict[str, Any]
Said = Callable[[Piece], TopRows | None]


def remote_teacher_facts(teacher: TeacherConfig) -> Facts:
    """Who a remote teacher is: as declared, since nobody here has seen its weights.

    `sha256` is of the declaration and of the name that the server knows it by.
    """
    require_permission(teacher.provenance, 'The remote teacher')
    provenance = dataclasses.asdict(teacher.provenance)
    declared = json.dumps([provenance, teacher.remote.model], sort_keys=True)
    return {'sha256': hashlib.sha256(declared.encode()).hexdigest(), 'provenance': provenance}


def require_texts_of_teacher(context: Context) -> None:
    """Refuses text that says it is of another teacher than the config declares, or of none.

    Raises:
        InputError: names the first row at fault, or that there is no row of the teacher.
    """
    declared = dataclasses.asdict(context.study.teacher.provenance)
    found = False
    source = os.path.expanduser(context.study.data.source)
    for path in sorted(glob.glob(source, recursive=True)):
        for _, record, where in jsonl_records(path) if path.endswith('.jsonl') else ():
            teacher = record.get('teacher') if isinstance(record, dict) else None
            found = found or teacher == declared
            if teacher is not None and teacher != declared:
                raise InputError(
                    f'{where}: must be of the teacher that config.teacher.provenance declares, '
                    f'{declared}; it is of {teacher}. Declare that one, or name other text.'
                )
    if not found:
        raise InputError(
            "config.targets.kind='text' needs config.data.source to be what experiments.remote "
            f'wrote, WORKDIR/remote/texts.jsonl; no row of {source!r} names its teacher.'
        )


def write_remote_targets(context: Context, teacher: Facts) -> dict[str, Any]:
    """Asks for every row of the student's first `steps` batches, and writes what was said.

    Returns:
        What the stage reports: steps, rows, tokens (padding included), and the share of predicted
        positions of which nothing was said.

    Raises:
        InputError: this is one of several processes, a key is missing, the budget does not reach,
            or the server cannot be asked.
    """
    if jax.process_count() > 1:
        raise InputError(
            'A remote teacher is asked by one process, which keeps the books; received '
            f'{jax.process_count()}. Run --stages=targets on one host, then the rest on all.'
        )
    study = context.study
    remote, k = study.teacher.remote, study.targets.k
    folder = context.workdir.stage('targets')
    tokenizer = remote_tokenizer(remote.tokenizer, study.data.tokenizer)
    names = TokenNames(tokenizer)
    manifest = make_manifest(
        TopKEstimator(k, study.targets.temperature),
        vocab_size=study.vocab_size,
        seq_len=study.data.seq_len,
        teacher=teacher,
        tokenizer=tokenizer.fingerprint,
        data=context.data_fingerprint,
    )
    writer = TargetsWriter(folder, manifest, rows_per_shard=study.targets.rows_per_shard)
    try:
        if remote.scoring == 'written':
            with contextlib.closing(WrittenScores(context, names, k)) as scores:
                silent = _write(context, writer, scores.batches())
        else:
            terms = _terms(remote, teacher, tokenizer.fingerprint, k)
            with AnswerLedger(folder / LEDGER, terms) as ledger:
                _ask(context, writer, ledger, names)
                said = functools.partial(_from_ledger, ledger, _scorer(remote, k))
                silent = _write(context, writer, itertools.repeat(said))
    finally:
        writer.close()
    rows = len(CachedTargets(folder, {}))
    tokens = rows * study.data.seq_len
    return {'steps': study.target_steps, 'rows': rows, 'tokens': tokens, 'silent_share': silent}


def _ask(context: Context, writer: TargetsWriter, ledger: AnswerLedger, names: TokenNames) -> None:
    """Asks for every piece of the rows that are not written yet."""
    study = context.study
    remote, k, steps = study.teacher.remote, study.targets.k, study.target_steps
    request_of = _scorer(remote, k)
    if ledger.cut_off:
        print(
            f'{len(ledger.cut_off)} requests were under way when this was killed: they may have '
            'been paid for, and count at the most they can cost',
            file=sys.stderr,
        )
    with progress_line('targets: asked', steps) as line:

        def requests() -> Iterator[Request]:
            for step, batch in enumerate(_batches(context), start=1):
                for piece in pieces_of(batch, np.flatnonzero(writer.missing(batch)).tolist()):
                    yield request_of(piece)
                line.update(step, tokens=ledger.spent.tokens)

        tally = ask_all(
            remote.server(),
            requests(),
            ledger,
            score_reader(_scoring(remote), k, names),
            remote.manner(),
            should_stop=lambda: context.stop.agreed(0),
        )
    limits = remote.manner().limits
    print(f'targets: spent {in_words(ledger.spent, limits)}', file=sys.stderr)
    if context.stop.agreed(0):
        raise Stopped('with what was answered in the ledger')
    if tally.given_up:
        raise RemoteError(
            f'{tally.given_up} requests were sent {remote.attempts} times without an answer. The '
            'same command sends them again; what is answered is kept.'
        )
    if tally.quarantined:
        print(
            f'targets: {tally.quarantined} answers are quarantined, with the reason, in {LEDGER}; '
            'nothing is learnt from the teacher where they would be',
            file=sys.stderr,
        )


def _write(context: Context, writer: TargetsWriter, said_of: Iterable[Said]) -> float:
    """Writes the rows of every batch; returns the share of positions of which nothing was said."""
    k, steps = context.study.targets.k, context.study.target_steps
    silent = trained = 0
    with progress_line('targets: written', steps) as line:
        for step, (batch, said) in enumerate(zip(_batches(context), said_of, strict=False), 1):
            targets = assemble(batch, k, said)
            silent += silent_positions(batch, targets)
            trained += int(np.asarray(batch.mask).sum())
            writer.add(batch, targets)
            line.update(step, tokens=trained)
    if silent == trained:
        raise InputError(
            'The remote teacher must have said something of the text; nothing is known of all '
            f'{trained} positions. The ledger has the reasons of answers that are quarantined.'
        )
    return silent / trained


def _batches(context: Context) -> Iterator[Batch]:
    pipeline = context.pipeline()
    for _ in range(context.study.target_steps):
        yield next(pipeline)


def _scorer(remote: RemoteConfig, k: int) -> Callable[[Piece], Request]:
    def request_of(piece: Piece) -> Request:
        return score_request(piece.ids, _scoring(remote), k, as_ids=remote.tokens_as_ids)

    return request_of


def _scoring(remote: RemoteConfig) -> Scoring:
    assert remote.scoring != 'written'
    return remote.scoring


def _from_ledger(
    ledger: AnswerLedger, request_of: Callable[[Piece], Request], piece: Piece
) -> TopRows | None:
    key = request_of(piece).key
    if ledger.outcome(key) != 'answered':
        return None
    return TopRows.unpacked(ledger.entry(key)['record'])


def _terms(remote: RemoteConfig, teacher: Facts, tokenizer: str, k: int) -> Facts:
    """What every answer depends on besides its text; the server may be moved."""
    return {
        'kind': 'scores',
        'model': remote.model,
        'provenance': teacher['provenance'],
        'tokenizer': tokenizer,
        'scoring': remote.scoring,
        'k': k,
    }
