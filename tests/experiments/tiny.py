"""A study of everything that trains in a second: the config file of the launch tests."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """A tiny study; data.source is given on the command line."""
    config = base.get_config()
    config.data.update(
        source='given on the command line',
        tokenizer='byte',
        held_out_fraction=0.2,
        held_out_documents=4,
        seq_len=16,
        batch_size=8,
    )
    for part in (config.teacher, config.student):
        part.model.update(num_layers=1, embed_dim=16, mlp_dim=32, scan_layers=False)
        part.model.attention.update(num_heads=2, num_kv_heads=2, head_dim=8)
        part.optimizer.warmup_steps = 2
        part.train.update(steps=12, micro_batches=1, chunk_size=64, log_every=1, checkpoint_every=3)
    config.student.model.moe.expert_dim = 16
    config.student.model.moe.router.num_experts = 4
    config.evaluate.update(
        batch_size=8, context_length=16, prefill_batch=8, prompts=('ab', 'the'), sample_tokens=4
    )
    return config
