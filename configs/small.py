"""A small dense teacher and a dense student of half its width: what the studies of losses share.

python -m experiments.launch --config=configs/small.py --workdir=runs/small

Hardware: two CPU cores, 2 GB of memory; two minutes (teacher 45 s, student 20, control 16, evaluate
16, beside some other work). Expect (jax 0.10.2): the student at 2.993 bits per byte, 0.212 fewer
than its control (0.170 to 0.255), the teacher at 2.612.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Text of short rows in 1,024 tokens; forward KL alone."""
    config = base.get_config()
    config.data.update(vocab_size=1024, max_bytes=4_000_000, seq_len=128, batch_size=16)
    config.data.update(held_out_fraction=0.1, held_out_documents=24)
    for part, width in ((config.teacher, 128), (config.student, 64)):
        part.model.update(num_layers=2, embed_dim=width, mlp_dim=3 * width)
        part.model.attention.update(num_heads=2, num_kv_heads=1, head_dim=32)
        part.optimizer.update(name='muon', learning_rate=5e-3, warmup_steps=20)
    config.teacher.train.update(steps=400, checkpoint_every=400)

    student = config.student
    student.model.moe = None
    student.balance.selection_bias_rate = 0.0
    student.train.update(steps=200, checkpoint_every=200)
    student.terms = dict(loss=base.term('forward_kl'))
    config.evaluate.update(context_length=128, sample_tokens=16)
    return config


def sweep(
    study: ml_collections.ConfigDict, baseline: str, variants: dict[str, dict]
) -> ml_collections.ConfigDict:
    """Variants of a study, by what each changes, with three seeds."""
    config = ml_collections.ConfigDict()
    config.study = study
    config.seeds = (0, 1, 2)
    config.baseline = baseline
    config.variants = variants
    return config
