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
    make_dense(config.teacher, width=128, layers=2, heads=2)
    make_dense(config.student, width=64, layers=2, heads=2)
    config.teacher.train.update(steps=400, checkpoint_every=400)

    student = config.student
    student.train.update(steps=200, checkpoint_every=200)
    student.terms = dict(loss=base.term('forward_kl'))
    config.evaluate.update(context_length=128, sample_tokens=16)
    return config


def make_dense(part: ml_collections.ConfigDict, *, width: int, layers: int, heads: int) -> None:
    """Makes a teacher or a student a small decoder without experts, trained by Muon."""
    part.model.update(num_layers=layers, embed_dim=width, mlp_dim=3 * width, moe=None)
    part.model.attention.update(num_heads=heads, num_kv_heads=1, head_dim=32)
    part.optimizer.update(name='muon', learning_rate=5e-3, warmup_steps=20)
    if 'balance' in part:
        part.balance.selection_bias_rate = 0.0


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
