"""What a teacher behind a server writes, against people's text and the teacher itself: three seeds.

    mkdir -p runs/gsm8k && cp GSM8K/gsm8k_train.jsonl GSM8K/gsm8k_test.jsonl runs/gsm8k/
    head -n 1500 runs/gsm8k/gsm8k_train.jsonl > runs/gsm8k/problems.jsonl
    export FRACTIONAL_API_KEY=a-secret-of-your-own
    python -m experiments.launch --config=configs/gsm8k_remote.py:teacher \\
        --workdir=runs/gsm8k/teacher --stages=teacher
    python -m experiments.serve --checkpoint=runs/gsm8k/teacher/teacher --name=gsm8k --port=8765 \\
        --rows=32 --max_length=2048 &
    python -m experiments.remote --config=configs/gsm8k_remote.py:server \\
        --workdir=runs/gsm8k/bought --prompts=runs/gsm8k/problems.jsonl
    python -m experiments.sweep --config=configs/gsm8k_remote.py --workdir=runs/gsm8k/sweep

`texts/student` learns what the server wrote to 1,500 questions, `weights/student` people's answers
to the same with the teacher beside them, `weights/control` those answers alone.

Hardware: two CPU cores, 2 GB of memory. Time: 28 minutes for the teacher, 7 to buy, 37 for the
sweep, on a machine that had other work to do.
Expect (jax 0.10.2; means of three seeds with 95 % t-intervals, of differences paired by seed):
people's text alone is read at 2.92 bits per byte; learnt from the server's text 0.06 less (0.17
less to 0.05 more), from the teacher's weights 0.16 less (0.10 to 0.22); GSM8K 0 % for all.
experiments/studies/gsm8k_remote.md has all of it.
"""

import ml_collections

from configs import base, small

FOLDER = 'runs/gsm8k'
QUESTION = 'Question: {question}\nAnswer:'


def study() -> ml_collections.ConfigDict:
    """Problems in bytes, all of the test file held out; a teacher of 1.2M parameters."""
    config = base.get_config()
    config.data.update(source=f'{FOLDER}/gsm8k_train.jsonl', field=f'{QUESTION} {{answer}}')
    config.data.update(held_out_source=f'{FOLDER}/gsm8k_test.jsonl', held_out_documents=100)
    config.data.update(tokenizer='byte', seq_len=512, batch_size=8)
    small.make_dense(config.teacher, width=160, layers=4, heads=5)
    small.make_dense(config.student, width=96, layers=2, heads=3)
    config.teacher.train.update(steps=500, checkpoint_every=100)
    config.student.train.update(steps=200, checkpoint_every=100)
    config.evaluate.update(context_length=512, prefill_batch=4, sample_tokens=64)
    return config


def served() -> ml_collections.ConfigDict:
    """The same problems, 1,500 of them, and a teacher that is reached by its server alone."""
    config = study()
    config.data.source = f'{FOLDER}/problems.jsonl'
    config.teacher.source = 'remote'
    config.teacher.provenance.update(name='gsm8k', version='1', licence='MIT')
    config.teacher.provenance.permits_training = True
    config.teacher.remote.update(base_url='http://127.0.0.1:8765/v1', model='gsm8k')
    config.teacher.remote.update(api_key_variable='FRACTIONAL_API_KEY', concurrency=64)
    config.teacher.remote.update(max_tokens=2_000_000, max_new_tokens=512, prompt=QUESTION)
    config.targets.kind = 'text'
    config.student.terms = dict(ce=base.term('cross_entropy'))
    return config


def sweep() -> ml_collections.ConfigDict:
    """Both variants see equally many tokens, and differ in what there is of the teacher."""
    shared = served()
    shared.exams.update(limit=50, rows=32)
    shared.exams.gsm8k.update(test=f'{FOLDER}/gsm8k_test.jsonl', shots=0, max_new_tokens=384)
    here = dict(source='checkpoint', checkpoint=f'{FOLDER}/teacher/teacher')
    terms = dict(ce=dict(weight=0.0), kl=base.term('forward_kl'))
    bought = dict(source=f'{FOLDER}/bought/remote/texts.jsonl', field='text')
    held_out = dict(held_out_field=shared.data.field)
    variants = dict(
        texts=dict(data=bought | held_out),
        weights=dict(teacher=here, targets=dict(kind='hidden'), student=dict(terms=terms)),
    )
    return small.sweep(shared, 'weights', variants)


def get_config(part: str = 'sweep') -> ml_collections.ConfigDict:
    """The study that trains the 'teacher', the one that asks its 'server', or the 'sweep'."""
    return {'teacher': study, 'server': served, 'sweep': sweep}[part]()
