"""Targets on disk: what is written is read, damage is named, and a kill loses no finished shard."""

import json
import operator
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from distill import target_store
from distill.cache import CachedTargets, TargetsWriter, make_manifest, read_manifest
from distill.estimators import Estimator, SampledEstimator, TopKEstimator
from distill.row_index import RowIndex, sequence_keys
from distill.target_codec import LOG_PROB_STEP, codec_for
from distill.target_store import TargetsWriteError
from distill.types import Batch, SampledTargets, TopKTargets
from moe.errors import InputError

T, V, K = 12, 70_000, 6
TOP_K, SAMPLED = TopKEstimator(K), SampledEstimator(20)
WEIGHTED = SampledEstimator(20, proposal_temperature=2.0)
ESTIMATORS = {'top_k': TOP_K, 'sampled': SAMPLED, 'weighted': WEIGHTED}


def rows(count: int, seed: int = 0) -> Batch:
    """Rows of one or two segments and some padding."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, V, (count, T)).astype(np.int32)
    segments = np.ones((count, T), np.int32)
    segments[::2, 5:] = 2
    segments[1::3, 9:] = 0
    return Batch(tokens, tokens, segments > 0, segments, segments)


def targets_of(estimator: Estimator, batch: Batch, seed: int = 0):
    """Targets as an estimator gives them: falling probabilities, or rising ids."""
    generator = np.random.default_rng(seed)
    shape = batch.tokens.shape
    if isinstance(estimator, TopKEstimator):
        logits = -np.sort(-generator.normal(0, 3, (*shape, K + 1)), axis=-1)
        log_probs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
        ids = np.argsort(generator.random((*shape, 50)), axis=-1)[..., :K] * 1399
        return TopKTargets(ids.astype(np.int32), log_probs[..., :-1], log_probs[..., -1])
    ids = np.sort((V - 1) * generator.random((*shape, 20)) ** 9, axis=-1).astype(np.int32)
    first = np.diff(ids, axis=-1, prepend=-1) > 0
    place = np.where(first, np.arange(20), 20)
    after = np.minimum.accumulate(place[..., ::-1], axis=-1)[..., ::-1]
    after = np.concatenate([after[..., 1:], np.full((*shape, 1), 20)], axis=-1)
    counts = np.where(first, after - np.arange(20), 0).astype(np.float32)
    if estimator.weighted:
        counts *= np.exp(-3 * generator.random((*shape, 20))).astype(np.float32)
    return SampledTargets(ids, counts)


def manifest_of(estimator: Estimator, **changed):
    facts = dict(
        vocab_size=V,
        seq_len=T,
        teacher={'sha256': 'aa'},
        tokenizer='tok',
        data={'source': 'text'},
    )
    return make_manifest(estimator, **facts | changed)


def write(directory, estimator: Estimator, count: int = 10, rows_per_shard: int = 4):
    writer = TargetsWriter(directory, manifest_of(estimator), rows_per_shard=rows_per_shard)
    batch = rows(count)
    targets = targets_of(estimator, batch)
    writer.add(batch, targets)
    writer.close()
    return batch, targets


def dense(targets, row: int, token: int) -> dict[int, float]:
    """The amounts of a token by id."""
    values = (
        np.exp(targets.log_probs)
        if isinstance(targets, TopKTargets)
        else np.asarray(targets.counts)
    )
    pairs = zip(targets.ids[row, token], values[row, token], strict=True)
    return {int(id_): float(value) for id_, value in pairs if value > 0}


@pytest.mark.parametrize('name', ESTIMATORS)
def test_what_was_written_is_read_in_any_order(tmp_path: pathlib.Path, name: str):
    batch, targets = write(tmp_path, ESTIMATORS[name])
    reader = CachedTargets(tmp_path, {'tokenizer': 'tok'})
    assert len(reader) == 10
    order = np.array([7, 0, 9, 3, 3])
    some = jax.tree.map(lambda x: x[order], batch)
    found = reader.read(some)
    tolerance = dict(rel=2 * LOG_PROB_STEP) if name != 'sampled' else dict(rel=0)
    for place, row in enumerate(order):
        for token in range(T):
            if batch.segment_ids[row, token]:
                expected = dense(targets, row, token)
                assert dense(found, place, token) == pytest.approx(expected, **tolerance)
            else:
                assert not dense(found, place, token)
    if name == 'top_k':
        real = some.segment_ids > 0
        np.testing.assert_allclose(
            found.tail_log_prob[real], targets.tail_log_prob[order][real], atol=2 * LOG_PROB_STEP
        )
        total = np.exp(found.log_probs).sum(-1) + np.exp(found.tail_log_prob)
        np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_log_probs_are_off_by_no_more_than_stated():
    batch = rows(50)
    codec = codec_for(TOP_K, V, T)
    targets, real = targets_of(TOP_K, batch), batch.segment_ids > 0
    found = codec.decode(codec.encode(targets, real), real, K)
    error = np.abs(found.log_probs - targets.log_probs)[real].max()
    assert LOG_PROB_STEP / 4 < error <= LOG_PROB_STEP


def test_unused_slots_any_order_and_no_tail():
    """As a server gives them: rising, fewer than k, nothing left over."""
    batch = rows(1)
    ids = np.broadcast_to(np.array([5, 9, 0, 0, 0, 0], np.int32), (1, T, K))
    log_probs = np.full((1, T, K), -np.inf, np.float32)
    log_probs[..., 0], log_probs[..., 1] = np.log(0.25), np.log(0.75)
    targets = TopKTargets(ids, log_probs, np.full((1, T), -np.inf, np.float32))
    codec, real = codec_for(TOP_K, V, T), batch.segment_ids > 0
    found = codec.decode(codec.encode(targets, real), real, K)
    assert dense(found, 0, 0) == pytest.approx({9: 0.75, 5: 0.25}, rel=0.01)
    assert found.tail_log_prob[0, 0] == -np.inf


def test_counts_past_a_byte():
    estimator = SampledEstimator(600)
    batch = rows(1)
    counts = np.zeros((1, T, 600), np.float32)
    counts[..., 0], counts[..., 1] = 599, 1
    ids = np.zeros((1, T, 600), np.int32)
    ids[..., 1] = V - 1
    codec, real = codec_for(estimator, V, T), batch.segment_ids > 0
    planes = codec.encode(SampledTargets(ids, counts), real)
    assert dense(codec.decode(planes, real, 2), 0, 3) == {0: 599, V - 1: 1}


def test_ids_outside_of_the_vocabulary_are_refused():
    batch = rows(1)
    targets = targets_of(TOP_K, batch)
    with pytest.raises(InputError, match=r'must be in \[0, 100\)'):
        codec_for(TOP_K, 100, T).encode(targets, batch.segment_ids > 0)


def test_keys_tell_tokens_and_segments_apart_and_nothing_else():
    batch = rows(3)
    keys = sequence_keys(batch)
    other = Batch(batch.tokens, batch.tokens, batch.mask, batch.segment_ids * 2, batch.positions)
    assert len({*keys, *sequence_keys(other)}) == 6
    as_int64 = Batch(
        batch.tokens.astype(np.int64), None, None, batch.segment_ids.astype(np.uint8), None
    )
    assert sequence_keys(as_int64) == keys
    index = RowIndex(keys, np.array([10, 11, 12]))
    assert [index.place(key) for key in reversed(keys)] == [12, 11, 10]
    assert index.place(bytes(16)) is None
    assert RowIndex([], np.array([], int)).place(keys[0]) is None


def test_another_study_is_refused_by_name(tmp_path: pathlib.Path):
    write(tmp_path, TOP_K)
    with pytest.raises(InputError, match=r"(?s)teacher.sha256: 'aa' there, 'bb' here.*estimator.k"):
        CachedTargets(tmp_path, {'teacher': {'sha256': 'bb'}, 'estimator': {'k': 7}})
    with pytest.raises(InputError, match="tokenizer: 'tok' there, 'other' here"):
        TargetsWriter(tmp_path, manifest_of(TOP_K, tokenizer='other'))
    with pytest.raises(InputError, match='1 are not among its 10'):
        CachedTargets(tmp_path, {}).read(rows(1, seed=9))
    with pytest.raises(InputError, match=r'Write them with --stages=targets'):
        CachedTargets(tmp_path / 'nowhere', {})


def test_the_manifest_says_what_they_are(tmp_path: pathlib.Path):
    write(tmp_path, WEIGHTED)
    manifest = read_manifest(tmp_path)
    assert manifest['estimator'] == {
        'kind': 'sampled',
        'draws': 20,
        'temperature': 1.0,
        'proposal_temperature': 2.0,
        'seed': 0,
    }
    assert manifest['teacher'] == {'sha256': 'aa'}
    assert {'jax', 'tensorstore'} <= manifest['versions'].keys()


def files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.rglob('*') if path.is_file())


def flip(file: pathlib.Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'remove'])
def test_damage_is_noticed_and_named(tmp_path: pathlib.Path, damage: str):
    """Every file in turn, at a place of chance: no damage passes, and the message has the path."""
    batch, _ = write(tmp_path / 'whole', SAMPLED)
    generator = np.random.default_rng(0)
    whole = CachedTargets(tmp_path / 'whole', {}).read(batch)
    for number, original in enumerate(files(tmp_path / 'whole')):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / 'whole', copy)
        file = copy / original.relative_to(tmp_path / 'whole')
        if damage == 'flip':
            flip(file, int(generator.integers(file.stat().st_size)))
        elif damage == 'truncate':
            os.truncate(file, file.stat().st_size - 1)
        else:
            file.unlink()
        message, found = read_or_message(copy, batch)
        if found is not None:
            # A manifest or a zarr.json says the same with one bit less of white space.
            assert file.suffix == '.json'
            np.testing.assert_array_equal(found.ids, whole.ids)
            np.testing.assert_array_equal(found.counts, whole.counts)
        elif damage == 'remove' and file.parent.name == target_store.JOURNAL:
            assert 'are not among its' in message
        else:
            assert str(copy) in message, file


def read_or_message(directory: pathlib.Path, batch: Batch):
    """What the targets are, or why they cannot be read."""
    try:
        return '', CachedTargets(directory, manifest_of(SAMPLED)).read(batch)
    except InputError as error:
        return str(error), None


def test_verify_reads_every_byte(tmp_path: pathlib.Path):
    write(tmp_path, TOP_K)
    CachedTargets(tmp_path, {}).verify()
    shard = tmp_path / 'arrays' / 'ids_0' / 'c' / '1' / '0'
    flip(shard, shard.stat().st_size // 2)
    with pytest.raises(InputError, match=r'ids_0/c/1/0 are damaged: its checksum differs'):
        CachedTargets(tmp_path, {}).verify()


def test_a_shard_without_its_journal_entry_does_not_exist(tmp_path: pathlib.Path):
    batch, targets = write(tmp_path, TOP_K)
    entry = tmp_path / 'journal' / '1.json'
    entry.unlink()
    # What a writer was killed in the middle of: its bytes may be anything.
    (tmp_path / 'arrays' / 'ids_0' / 'c' / '1' / '0').write_bytes(b'half of a shard')
    assert len(CachedTargets(tmp_path, {})) == 6
    writer = TargetsWriter(tmp_path, manifest_of(TOP_K), rows_per_shard=4)
    np.testing.assert_array_equal(writer.missing(batch), [*[False] * 4, *[True] * 4, *[False] * 2])
    writer.add(batch, targets)
    writer.close()
    reader = CachedTargets(tmp_path, {})
    assert len(reader) == 10
    assert dense(reader.read(batch), 5, 0) == pytest.approx(dense(targets, 5, 0), rel=0.02)


def test_writers_own_shards(tmp_path: pathlib.Path):
    """Two hosts write at once, a third session goes on after both; no row is there twice."""
    batch = rows(20)
    targets = targets_of(SAMPLED, batch)

    writers = [
        TargetsWriter(tmp_path, manifest_of(SAMPLED), index=i, count=2, rows_per_shard=3)
        for i in range(2)
    ]
    for index, writer in enumerate(writers):
        part = slice(8 * index, 8 * (index + 1))
        writer.add(*jax.tree.map(operator.itemgetter(part), (batch, targets)))
    for writer in writers:
        writer.close()
    last = TargetsWriter(tmp_path, manifest_of(SAMPLED), rows_per_shard=3)
    last.add(batch, targets)
    last.close()
    records = [json.loads(p.read_text()) for p in (tmp_path / 'journal').iterdir()]
    assert sorted(len(record['keys']) for record in records) == [1, 2, 2, 3, 3, 3, 3, 3]
    reader = CachedTargets(tmp_path, {})
    assert len(reader) == 20
    found = reader.read(batch)
    for row in range(20):
        assert dense(found, row, 0) == dense(targets, row, 0)


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: pathlib.Path):
    write(tmp_path, TOP_K, count=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = TargetsWriter(tmp_path, manifest_of(TOP_K), rows_per_shard=4)
    batch = rows(3, seed=1)
    writer.add(batch, targets_of(TOP_K, batch))
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(TargetsWriteError, match=r'Make room on the disk'):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reader = CachedTargets(tmp_path, {})
    assert len(reader) == 4
    reader.verify()
    # With room again, the same rows are written.
    writer = TargetsWriter(tmp_path, manifest_of(TOP_K), rows_per_shard=4)
    writer.add(batch, targets_of(TOP_K, batch))
    writer.close()
    assert len(CachedTargets(tmp_path, {})) == 7


KILLED = """
import os, pathlib, random, signal, sys, time
import test_cache as t
folder, rounds = pathlib.Path(sys.argv[1]), int(sys.argv[2])
batch = t.rows(60)
targets = t.targets_of(t.TOP_K, batch)
for _ in range(rounds):
    child = os.fork()
    if child == 0:
        writer = t.TargetsWriter(folder, t.manifest_of(t.TOP_K), rows_per_shard=2)
        writer.add(batch, targets)
        writer.close()
        os._exit(0)
    time.sleep(random.uniform(0.01, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_killed_at_moments_of_chance(tmp_path: pathlib.Path):
    """Whatever the journal lists after SIGKILLs is whole, and what is missing is written later."""
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])
    }
    command = [sys.executable, '-c', KILLED, str(tmp_path), '12']
    subprocess.run(command, check=True, env=environment, timeout=300)
    batch = rows(60)
    targets = targets_of(TOP_K, batch)
    before = 0
    if (tmp_path / 'store.json').exists():
        reader = CachedTargets(tmp_path, {})
        reader.verify()
        before = len(reader)
    writer = TargetsWriter(tmp_path, manifest_of(TOP_K), rows_per_shard=2)
    assert writer.missing(batch).sum() == 60 - before
    writer.add(batch, targets)
    writer.close()
    reader = CachedTargets(tmp_path, {})
    found = reader.read(batch)
    for row in range(60):
        assert dense(found, row, 0) == pytest.approx(dense(targets, row, 0), rel=0.02)
