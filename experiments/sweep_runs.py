"""The runs of a sweep, one after the other, and what their comparison says."""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from distill import distributed
from distill.comparison import compare_variants, comparison_picture, comparison_table
from distill.pictures import png
from experiments.circumstances import circumstances
from experiments.context import Context
from experiments.reporting import UNITS, read_curve
from experiments.signals import StopSignal
from experiments.stages import USUAL_STAGES, run_stages
from experiments.sweep_config import Run
from experiments.workdir import read_json, write_json


def folder_of(workdir: pathlib.Path, run: Run) -> pathlib.Path:
    """Returns the workdir of one run."""
    return workdir / run.variant / f'seed_{run.seed}'


def run_all(runs: Sequence[Run], workdir: pathlib.Path, command: str) -> None:
    """Runs every study from its first stage to its last.

    Args:
        runs: in the order in which they run.
        workdir: of the sweep.
        command: that repeats the sweep.
    """
    stop = StopSignal()
    for number, run in enumerate(runs):
        folder = folder_of(workdir, run)
        if distributed.is_writer():
            print(f'{run.variant}, seed {run.seed}: {number + 1} of {len(runs)}', file=sys.stderr)
            share(run, runs[:number], workdir)
        distributed.barrier(f'{folder}: shared')
        context = Context(run.config, str(folder), command=command, stop=stop)
        run_stages(context, USUAL_STAGES)
        jax.clear_caches()


def share(run: Run, earlier: Sequence[Run], workdir: pathlib.Path) -> None:
    """Links what an earlier run of the same inputs has made already."""
    for other in earlier:
        if other.teacher_inputs == run.teacher_inputs:
            for name in ('tokenizer', 'tokens', 'teacher'):
                _link(folder_of(workdir, run) / name, folder_of(workdir, other) / name)
        if other.control_inputs == run.control_inputs:
            _link(folder_of(workdir, run) / 'control', folder_of(workdir, other) / 'control')


def _link(link: pathlib.Path, target: pathlib.Path) -> None:
    """Links to a folder, relatively, so that the sweep can be moved as a whole."""
    if not os.path.lexists(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


def compare(
    runs: Sequence[Run], workdir: pathlib.Path, baseline: str, command: str
) -> dict[str, Any]:
    """Compares the complete runs, writes comparison.json, .md and .png, and prints the table."""
    folders: dict[str, list[pathlib.Path]] = {}
    for run in runs:
        folders.setdefault(run.variant, []).append(folder_of(workdir, run))
    summaries = {
        name: [read_json(folder / 'summary.json') for folder in found]
        for name, found in folders.items()
    }
    variants = compare_variants(summaries, baseline)
    data, seeds = runs[0].study.data, sorted({run.seed for run in runs})
    comparison = {
        'schema': 1,
        'command': command,
        **circumstances(),
        'seeds': seeds,
        'tokens': runs[0].tokens,
        'baseline': baseline,
        'seconds': {name: _seconds(found) for name, found in summaries.items()},
        'variants': variants,
    }
    write_json(workdir / 'comparison.json', comparison)
    text = (
        f'{comparison_table(variants, baseline)}\n\n'
        f'Means of {len(seeds)} seeds, {runs[0].tokens:,} tokens each; in brackets 95 % '
        't-intervals over seeds, of differences paired by seed.\n'
    )
    (workdir / 'comparison.md').write_text(f'`{command}`\n\n{text}')
    curves = {
        name: [read_curve(folder / 'student') for folder in found]
        for name, found in folders.items()
    }
    tokens_per_step = data.batch_size * data.seq_len
    picture = comparison_picture(variants, curves, tokens_per_step=tokens_per_step)
    (workdir / 'comparison.png').write_bytes(png(picture))
    print(f'\n{text}\nComparison: {workdir / "comparison.md"}')
    return comparison


def _seconds(summaries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Adds up what each stage took, over the seeds; what is shared counts for each that uses it."""
    stages = {name for summary in summaries for name in summary['stages']}
    return {
        name: round(sum(summary['stages'][name]['seconds'] for summary in summaries), 1)
        for name in USUAL_STAGES
        if name in stages
    }


def figures(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Gives the means over seeds as rows of figures; the reference is the baseline's."""
    rows = []
    variants, baseline = comparison['variants'], comparison['baseline']
    for name, parts in variants.items():
        for who, metrics in parts['models'].items():
            for metric, measured in metrics.items():
                row = {
                    'name': f'{name}/{who}/{metric}',
                    'value': measured['value'],
                    'unit': UNITS[metric],
                }
                reference = variants[baseline]['models'][who].get(metric)
                if reference is not None and reference['value']:
                    row |= {
                        'reference': reference['value'],
                        'ratio': measured['value'] / reference['value'],
                    }
                conditions = f'mean of seeds {comparison["seeds"]}; {comparison["command"]}'
                rows.append(row | {'conditions': conditions})
    return rows
