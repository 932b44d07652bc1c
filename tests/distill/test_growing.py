"""Batches of growing text: each epoch's tokens once, the same on any hosts and after any stop."""

import json

import numpy as np
import pytest

from distill.corpus import TokenCorpus, tokenize
from distill.data import DataConfig
from distill.growing import GrowingPipeline
from distill.sources import Document
from distill.tokenizer import ByteTokenizer
from moe.errors import InputError

CONFIG = DataConfig(seq_len=8, batch_size=4, seed=0)


def corpus(epoch: int, word: str = 'text') -> TokenCorpus:
    """Three documents more in each epoch."""
    documents = [Document(str(i), f'{word} {i:03}') for i in range(3 * (epoch + 1))]
    return tokenize(documents, ByteTokenizer())


def pipeline(corpus_of=corpus, config: DataConfig = CONFIG, **share) -> GrowingPipeline:
    return GrowingPipeline(corpus_of, config, **share)


def rows(source, batches: int) -> np.ndarray:
    return np.concatenate([next(source).tokens for _ in range(batches)])


def tokens(epoch: int) -> list[int]:
    return sorted(corpus(epoch).tokens.tolist())


def test_an_epoch_holds_each_of_its_tokens_once():
    """Documents have 10 tokens: 30, 60 and 90 in rows of 8 are 4, 8 and 12 rows, 6 batches."""
    source = pipeline()
    batches = [next(source) for _ in range(6)]
    real = [batch.tokens[batch.segment_ids > 0] for batch in batches]
    ends = (0, 1, 3, 6)
    for epoch in range(3):
        seen = np.concatenate(real[ends[epoch] : ends[epoch + 1]])
        assert sorted(seen.tolist()) == tokens(epoch)


def test_no_row_is_lost_where_a_batch_holds_two_epochs():
    config = DataConfig(seq_len=8, batch_size=3, seed=0)
    found = rows(pipeline(config=config), 4)
    np.testing.assert_array_equal(found, rows(pipeline(), 3))


def test_rows_and_documents_are_shuffled_by_the_seed():
    other = DataConfig(seq_len=8, batch_size=4, seed=1)
    assert (rows(pipeline(), 3) != rows(pipeline(config=other), 3)).any()
    same_text = rows(pipeline(lambda _: corpus(2)), 6)
    assert (same_text[:12] != same_text[12:]).any()


def test_hosts_share_batches_and_open_epochs_at_the_same_one():
    opened: list[list[int]] = [[], []]
    config = DataConfig(seq_len=8, batch_size=6, seed=0)
    whole = pipeline(config=config)
    hosts = [
        pipeline(
            lambda epoch, host=host: (opened[host].append(epoch), corpus(epoch))[1],
            config,
            process_index=host,
            process_count=2,
        )
        for host in range(2)
    ]
    for _ in range(4):
        parts = [next(host).tokens for host in hosts]
        assert max(opened[0]) == max(opened[1])
        np.testing.assert_array_equal(np.concatenate(parts), next(whole).tokens)
    with pytest.raises(InputError, match=r'a multiple of the number of hosts, 3'):
        pipeline(process_count=3)


@pytest.mark.parametrize('taken', range(8))
def test_goes_on_from_any_position(taken: int):
    source = pipeline()
    rows(source, taken) if taken else None
    state = json.loads(json.dumps(source.get_state()))
    again = pipeline()
    next(again)
    again.set_state(state)
    np.testing.assert_array_equal(rows(again, 4), rows(source, 4))
    assert again.get_state() == source.get_state()


def test_only_the_epochs_at_hand_are_opened_again():
    source = pipeline()
    rows(source, 7)
    opened = []
    again = pipeline(lambda epoch: (opened.append(epoch), corpus(epoch))[1])
    again.set_state(source.get_state())
    next(again)
    assert opened == [3]


def test_other_text_or_config_is_refused():
    source = pipeline()
    rows(source, 2)
    changed = pipeline(lambda epoch: corpus(epoch, 'else'))
    changed.set_state(source.get_state())
    with pytest.raises(InputError, match='Epoch 1 must be of the text that the saved position'):
        next(changed)
    with pytest.raises(InputError, match=r'seed \(was 0, is 5\)'):
        pipeline(config=DataConfig(seq_len=8, batch_size=4, seed=5)).set_state(source.get_state())
    with pytest.raises(InputError, match='must be one in a growing source'):
        pipeline().set_state({'position': {}, 'fingerprint': {}})
