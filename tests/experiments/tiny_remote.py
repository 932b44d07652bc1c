"""A tiny study of a remote teacher: where it is, is given on the command line."""

import ml_collections
import tiny


def get_config() -> ml_collections.ConfigDict:
    """The tiny study, taught by a server."""
    config = tiny.get_config()
    config.data.update(held_out_documents=2, batch_size=8, seq_len=24)
    config.teacher.source = 'remote'
    config.teacher.provenance.update(
        name='tiny', version='1', licence='Apache-2.0', permits_training=True
    )
    config.teacher.remote.update(
        model='tiny', api_key_variable='TINY_KEY', concurrency=3, timeout=60.0
    )
    config.teacher.remote.update(attempts=4, first_wait=0.01, longest_wait=0.05)
    config.targets.update(kind='top_k', cached=True, k=4, rows_per_shard=4)
    config.student.train.update(steps=2)
    config.student.model.moe.dispatch = 'dense'
    config.student.optimizer.warmup_steps = 1
    config.data.max_bytes = 3000
    return config
