"""Has a remote teacher write texts: data for distillation by sequences.

    python -m experiments.remote --config=STUDY --workdir=runs/mine --prompts=prompts.jsonl

The config is a study's with teacher.source='remote': where the server is, which environment
variable holds its key, what it may cost, and the teacher's declaration, without which it is asked
nothing. A line of the prompts is a JSON object with `messages`, which a chat completion answers, or
with `prompt`, which a completion continues; and an `id`, if it is to be found again by one. Rows of
another kind become prompts by their fields: --config.teacher.remote.prompt='Question: {question}'.

WORKDIR/remote/texts.jsonl has a line for each text, in the order of the prompts, with the teacher
and its licence; the same study reads it with --config.data.source=WORKDIR/remote/texts.jsonl and
--config.data.field=messages (or text). WORKDIR/remote/ledger.jsonl is the record of what was asked
and paid, and why an answer was put aside. The same command goes on after a kill or a raised budget,
and asks prompts that were added: no answer is paid for twice.
"""

import collections
import json
import pathlib
import sys
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from distill.answer_ledger import AnswerLedger
from distill.asking import Tally, ask_all
from distill.budget import in_words
from distill.loop import Stopped
from experiments import cli
from experiments.bulk import read_prompts
from experiments.remote_texts import LEDGER, TEXTS, Texts
from experiments.signals import StopSignal
from experiments.study import StudyConfig, build_study
from experiments.watch import progress_line
from experiments.workdir import Workdir
from moe.errors import InputError

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The study: a file that defines get_config().'
)
WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of the study, made where it is missing.')
PROMPTS = flags.DEFINE_string('prompts', None, 'The file of prompts, .jsonl.')
JSON = flags.DEFINE_string('json', None, 'Where to write what was asked and paid, as JSON rows.')


def main() -> None:
    """Asks what is not answered yet, and writes the texts."""
    logging.set_verbosity(logging.WARNING)
    config, path = cli.required(CONFIG), cli.required(WORKDIR)
    study = build_study(config)
    if study.teacher.source != 'remote':
        raise InputError(
            "experiments.remote needs config.teacher.source='remote'; received "
            f'{study.teacher.source!r}. A model of ours writes with experiments.generate.'
        )
    prompts = read_prompts(pathlib.Path(cli.required(PROMPTS)), study.teacher.remote.prompt)
    texts = Texts(study, prompts)
    server = study.teacher.remote.server()
    stop = StopSignal()
    folder = Workdir(path, config).stage('remote')
    with AnswerLedger(folder / LEDGER, texts.terms()) as ledger:
        _say_what_is_left(texts, ledger)
        with progress_line('remote', len(texts.requests)) as line:
            done = sum(ledger.outcome(request.key) is not None for request in texts.requests)

            def progress(tally: Tally) -> None:
                line.update(done + tally.answered + tally.quarantined, tokens=ledger.spent.tokens)

            try:
                tally = ask_all(
                    server,
                    texts.requests,
                    ledger,
                    texts.read,
                    study.teacher.remote.manner(),
                    should_stop=lambda: stop.agreed(0),
                    progress=progress,
                )
            finally:
                counts = texts.write(ledger, folder / TEXTS)
        _report(study, ledger, counts, folder)
        left = sum(ledger.outcome(request.key) is None for request in texts.requests)
    if left and stop.agreed(0):
        raise Stopped(f'with {left} of {len(texts.requests)} prompts to be asked')
    if tally.given_up:
        raise InputError(
            f'{tally.given_up} prompts were sent {study.teacher.remote.attempts} times without an '
            'answer. The same command sends them again; what is answered is kept.'
        )


def _say_what_is_left(texts: Texts, ledger: AnswerLedger) -> None:
    left = [request for request in texts.requests if ledger.outcome(request.key) is None]
    print(f'{len(texts.requests)} prompts, {len(left)} to be asked', file=sys.stderr)
    again = sum(request.key in ledger.cut_off for request in left)
    if again:
        print(
            f'{again} of them were under way when this was killed: they may have been paid for, '
            'count at the most they can cost, and are sent again under the same Idempotency-Key',
            file=sys.stderr,
        )


def _report(
    study: StudyConfig,
    ledger: AnswerLedger,
    counts: collections.Counter[str],
    folder: pathlib.Path,
) -> None:
    """Prints what there is, and writes it as rows where asked."""
    limits = study.teacher.remote.manner().limits
    print(f'{counts["texts"]} texts in {folder / TEXTS}; spent {in_words(ledger.spent, limits)}')
    if counts['cut']:
        print(
            f'{counts["cut"]} texts were cut off at max_new_tokens and left out: raise '
            'config.teacher.remote.max_new_tokens in another workdir, or set keep_cut=True'
        )
    if counts['quarantined']:
        print(f'{counts["quarantined"]} answers are quarantined, with the reason, in the ledger')
    if JSON.value is None:
        return
    figures: list[tuple[str, Any, str]] = [
        ('remote/texts', counts['texts'], 'texts'),
        ('remote/cut', counts['cut'], 'texts'),
        ('remote/quarantined', counts['quarantined'], 'answers'),
        ('remote/tokens', ledger.spent.tokens, 'tokens'),
    ]
    if limits.priced:
        figures.append(('remote/dollars', ledger.spent.dollars, 'USD'))
    conditions = f'{study.teacher.remote.model}, {PROMPTS.value}'
    rows = [
        {'name': name, 'value': value, 'unit': unit, 'conditions': conditions}
        for name, value, unit in figures
    ]
    file = pathlib.Path(JSON.value)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=2, allow_nan=False) + '\n')


if __name__ == '__main__':
    cli.run(main)
