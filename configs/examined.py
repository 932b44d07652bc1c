"""What a student and its control retain of their teacher, in exams that need no data.

    pip install -e '.[eval]'
    python -m experiments.launch --config=configs/examined.py --workdir=runs/examined

GSM8K too, where its file is here: --config.exams.gsm8k.test=PATH --config.exams.gsm8k.shots=0
--config.exams.max_length=2048

Hardware: two CPU cores (x86-64), 2 GB of memory. Time: 6.4 minutes of processor time, 40 by the
clock on a machine that had much other work to do; the exams alone take 25 seconds.
Expect (jax 0.10.2, lm-eval 0.4.13; standard errors): python_endings, of four endings each, 64.8 %
(2.4) for the teacher, 57.0 % (2.5) for the student, which retains 88.0 % (3.6) of that, and 47.5 %
(2.5) for its control, which retains 73.4 % (3.3); the needle among four by chance (20.6 %, 25.6 %
and 22.5 %, 3.4 each). Calibration error 4.3 %, 2.4 % and 2.5 %; top-1 agreement with the teacher
40.7 % and 34.3 %; KL on the student's own text 0.717 nats, the control's 1.035.
"""

import ml_collections

from configs import base, small


def get_config() -> ml_collections.ConfigDict:
    """The small study with more steps and longer rows."""
    config = small.get_config()
    config.data.update(seq_len=256, batch_size=8)
    config.teacher.train.update(steps=1000, checkpoint_every=500)
    config.student.train.update(steps=400, checkpoint_every=200)
    # Nothing is written while it learns: the KL is measured on its own text.
    config.student.rollout = base.rollout()
    config.student.rollout.update(lmbda=0.0, max_new_tokens=64)
    config.evaluate.update(context_length=256, sample_tokens=64)
    config.exams.update(tasks=('python_endings',), tasks_path='experiments/tasks')
    config.exams.update(rows=32, max_length=256)
    config.exams.needle.update(lengths=(128, 256), trials=16)
    return config
