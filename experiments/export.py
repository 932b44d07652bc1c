"""The export stage: the student as others load it, and a model card of what was measured."""

import dataclasses
import pathlib
import shutil
from typing import Any

from distill import distributed
from distill.pretrained_tokenizer import write_pretrained
from distill.provenance import in_words
from distill.tables import student_start
from experiments.context import Context
from experiments.initial import started_from
from moe.config import TransformerConfig
from moe.convert import family_of, save_pretrained

_FIGURES = (
    ('bits per byte', 'bits_per_byte'),
    ('cross-entropy, nats per token', 'cross_entropy'),
    ('accuracy of the next token', 'accuracy'),
    ('KL from teacher, nats per token', 'kl_from_teacher'),
    ('agreement with teacher', 'top1_agreement'),
    ('FLOPs per token', 'flops_per_token'),
    ('tokens per second', 'tokens_per_second'),
    ('USD per million tokens', 'usd_per_million_tokens'),
)


def export_student(context: Context, config: TransformerConfig, variables: Any) -> dict[str, Any]:
    """Writes WORKDIR/export/model.

    Returns:
        What the stage reports: the family that the student is of.
    """
    folder = context.workdir.stage('export')
    tokenizer = folder / 'tokenizer'
    if distributed.is_writer():
        shutil.rmtree(tokenizer, ignore_errors=True)
        write_pretrained(context.tokenizer, tokenizer)
    save_pretrained(
        folder / 'model',
        config,
        variables,
        tokenizer=tokenizer,
        card=model_card(context),
        context_length=context.study.data.seq_len,
    )
    distributed.barrier('export: written')
    return {'family': family_of(config).model_type, 'folder': 'export/model'}


def model_card(context: Context) -> str:
    """Says who taught the student, how, what was measured, what it costs and how to repeat it."""
    evaluation = context.workdir.require_result('evaluate', wanted_by='export')
    study = context.study
    licence = teacher_licence(context)
    front = ['---', 'library_name: transformers', 'tags: [distillation, fractional]']
    front += [] if licence is None else [f'license: {licence}']
    recipe = [f'{term.weight} x {term.name}' for term in study.student.terms.values()]
    recipe += [
        f'{feature.weight} x {feature.kind} (feature)'
        for feature in (study.student.features or {}).values()
    ]
    across = study.student.cross_tokenizer
    recipe += [] if across is None else [f'{across.weight} x {across.method} (across tokenizers)']
    optimizer, train = study.student.optimizer, study.student.train
    tokens = train.steps * study.data.batch_size * study.data.seq_len
    return '\n'.join(
        [
            *front,
            '---',
            '',
            '# A student distilled with Fractional',
            '',
            f'- Teacher: {_teacher(context)}{_others(context)}.',
            *_start(context),
            f'- Licence of the teacher: {licence or "not recorded"}. A student is bound by its '
            "teacher's licence and by that of the text.",
            f'- Recipe: {", ".join(recipe)}; {train.steps} steps of {study.data.batch_size} rows '
            f'of {study.data.seq_len} tokens ({tokens:,} tokens) of {study.data.source!r}; '
            f'{optimizer.name}, learning rate {optimizer.learning_rate}; seed {study.seed}.',
            f'- Command: `{context.command}`',
            f'- {_comparison(evaluation["comparison"])}',
            '',
            'Measured on held-out text of the same source, with 95 % bootstrap intervals over '
            'documents; the control is the same student, trained without a teacher.',
            '',
            *_table(evaluation['models']),
            '',
        ]
    )


def teacher_licence(context: Context) -> str | None:
    """Returns the licence that a published teacher's own card names, or a remote one's declared."""
    teacher = context.study.teacher
    if teacher.source == 'remote':
        return teacher.provenance.licence
    if teacher.source != 'hf':
        return None
    card = pathlib.Path(str(teacher.checkpoint)) / 'README.md'
    lines = card.read_text(errors='replace').splitlines() if card.is_file() else []
    if not lines or lines[0].strip() != '---':
        return None
    for line in lines[1:]:
        if line.strip() == '---':
            break
        if line.startswith('license:'):
            return line.removeprefix('license:').strip() or None
    return None


def _teacher(context: Context) -> str:
    teacher = context.study.teacher
    if teacher.source == 'hf':
        return f'the published model in `{pathlib.Path(str(teacher.checkpoint)).name}`'
    if teacher.source == 'remote':
        return f'{in_words(dataclasses.asdict(teacher.provenance))}; asked as a remote server'
    if teacher.source == 'checkpoint':
        return f'a model of another study, `{teacher.checkpoint}`'
    if teacher.source == 'ema':
        return f'the average of its own parameters, of decay {teacher.ema_decay}'
    steps = teacher.train.steps
    return f'a model trained in the same study, on the same text, for {steps} steps'


def _start(context: Context) -> list[str]:
    start = started_from(context)
    return [] if start['method'] == 'random' else [f'- {student_start({"student_start": start})}']


def _others(context: Context) -> str:
    more = context.study.more_teachers or {}
    return ''.join(f'; and {name}, of `{own.checkpoint}`' for name, own in more.items())


def _comparison(comparison: dict[str, Any]) -> str:
    parts = []
    gain = comparison.get('control_minus_student_bits_per_byte')
    if gain is not None:
        parts.append(f'{_figure(gain)} bits per byte fewer than its control')
    flops = comparison.get('teacher_to_student_flops')
    if flops is not None:
        parts.append(f"1/{flops:.3g} of its teacher's FLOPs per token")
    return f'Result: {", ".join(parts)}.'


def _table(models: dict[str, dict[str, Any]]) -> list[str]:
    """Gives every figure that was measured of any model."""
    names = list(models)
    lines = [f'| | {" | ".join(names)} |', f'|---|{"---:|" * len(names)}']
    parameters = [models[name]['parameters'] for name in names]
    both = ' | '.join(f'{p["total"]:,} / {p["active"]:,}' for p in parameters)
    lines.append(f'| parameters, total / active | {both} |')
    for title, key in _FIGURES:
        cells = [_figure(models[name].get(key)) for name in names]
        lines += [f'| {title} | {" | ".join(cells)} |'] if any(cells) else []
    return lines


def _figure(value: Any) -> str:
    """Writes a figure with its interval, a plain one, or nothing where none was measured."""
    if value is None:
        return ''
    if not isinstance(value, dict):
        return f'{value:.4g}'
    interval = f' ({value["low"]:.4g} to {value["high"]:.4g})' if 'low' in value else ''
    return f'{value["value"]:.4g}{interval}'
