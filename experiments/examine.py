"""Examines a model, and compares it with its teacher where one is named.

    python -m experiments.examine --checkpoint=runs/quickstart/student \\
        --teacher=runs/quickstart/teacher --tasks=arc_easy,lambada_openai \\
        --gsm8k=gsm8k_test.jsonl --gsm8k_train=gsm8k_train.jsonl --needle_lengths=256,512,1024

Tasks are those of lm-eval (the extra `eval`), whose data must be on this machine; --tasks_path
names a folder of others. GSM8K is answered by our own sampler, and judged by exact match of the
number; a needle is found where the right one of the numbers in a text is held likeliest. With
--chat a published model is asked tasks and GSM8K in conversations, as its folder's template writes
them (the extra `chat`). The same exams are a stage of a study: see config.exams.
"""

import json
import pathlib
import shlex
import sys

from absl import flags, logging

from distill.exam_table import exam_rows
from distill.terminal import aligned
from experiments import cli
from experiments.exam_config import ExamConfig, GSM8KConfig, NeedleConfig
from experiments.exams import Sat, make_examinee, results, sit
from experiments.model_flags import CHECKPOINT, loaded_model
from experiments.reporting import exam_figures
from experiments.writing_flags import MAX_LENGTH, ROWS
from moe.errors import InputError

TEACHER = flags.DEFINE_string('teacher', None, 'Whom to compare with: a trained stage, too.')
TASKS = flags.DEFINE_list('tasks', [], 'Of lm-eval, by name, with commas.')
TASKS_PATH = flags.DEFINE_string('tasks_path', None, "A folder of more tasks' YAML files.")
SHOTS = flags.DEFINE_integer('shots', None, "Examples before each question; each task's own.", 0)
LIMIT = flags.DEFINE_integer('limit', None, 'Questions of a task, and of GSM8K; all.', 1)
CHAT = flags.DEFINE_bool('chat', False, "Ask in conversations, by the folder's chat template.")
SYSTEM = flags.DEFINE_string('system', None, 'What conversations begin with.')
MULTITURN = flags.DEFINE_bool('multiturn', True, 'Examples are turns of a conversation.')
GSM8K = flags.DEFINE_string('gsm8k', None, 'The test file of GSM8K, .jsonl.')
GSM8K_TRAIN = flags.DEFINE_string('gsm8k_train', None, 'The file its examples are drawn from.')
GSM8K_SHOTS = flags.DEFINE_integer('gsm8k_shots', 5, 'Examples before each question.', 0)
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 256, 'Of an answer to GSM8K.', 1)
LENGTHS = flags.DEFINE_list('needle_lengths', [], 'Tokens of texts with needles, with commas.')
TRIALS = flags.DEFINE_integer('needle_trials', 8, 'Of each length and depth.', lower_bound=1)
SEED = flags.DEFINE_integer('seed', 0, 'Equal seeds ask equal questions.', lower_bound=0)
JSON = flags.DEFINE_string('json', None, 'Where to write the scores as JSON rows.')


def main() -> None:
    """Has the model, and its teacher, sit the exams, and prints what they scored."""
    logging.set_verbosity(logging.WARNING)
    checkpoint, config = cli.required(CHECKPOINT), exam_config()
    if not config.any:
        raise InputError('Name an exam: --tasks, --gsm8k or --needle_lengths. See --help.')
    sat = {}
    if TEACHER.value is not None:
        sat['teacher'] = _sit(TEACHER.value, config)
    sat['model'] = _sit(checkpoint, config)
    found = results(sat, seed=SEED.value)
    exams = found['exams']
    print('\n'.join(aligned(list(exams), exam_rows(exams))))
    if JSON.value is not None:
        models = {name: {'exams': rows} for name, rows in exams.items()}
        command = shlex.join(['python', '-m', 'experiments.examine', *sys.argv[1:]])
        rows = exam_figures(models, command)
        file = pathlib.Path(JSON.value)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=2, allow_nan=False) + '\n')


def exam_config() -> ExamConfig:
    """Reads which exams the flags ask for."""
    try:
        lengths = tuple(int(length) for length in LENGTHS.value)
    except ValueError as error:
        raise InputError(
            f'--needle_lengths must be whole numbers with commas; received {LENGTHS.value}.'
        ) from error
    return ExamConfig(
        tasks=tuple(TASKS.value),
        tasks_path=TASKS_PATH.value,
        shots=SHOTS.value,
        limit=LIMIT.value,
        chat=CHAT.value,
        system=SYSTEM.value,
        multiturn=MULTITURN.value,
        gsm8k=GSM8KConfig(GSM8K.value, GSM8K_TRAIN.value, GSM8K_SHOTS.value, MAX_NEW_TOKENS.value),
        needle=NeedleConfig(lengths, trials=TRIALS.value),
        rows=ROWS.value,
        max_length=MAX_LENGTH.value,
    )


def _sit(checkpoint: str, config: ExamConfig) -> Sat:
    loaded = loaded_model(checkpoint)
    examinee = make_examinee(loaded.model, loaded.variables, loaded.tokenizer, config)
    return sit(examinee, config, seed=SEED.value)


if __name__ == '__main__':
    cli.run(main)
