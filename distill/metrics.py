"""What a run says as it goes: (sum, weight) pairs to means, metric files, a line of progress."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from moe.errors import InputError

Pairs = Mapping[str, tuple[Any, Any]]


class Metrics:
    """Adds up (sum, weight) pairs over steps, so that a mean weighs each token alike.

    The pairs stay on the device until `means` is called: adding never waits for the device.
    """

    def __init__(self) -> None:
        self._added: list[Pairs] = []

    def add(self, pairs: Pairs) -> None:
        """Adds one step's pairs; a name may be missing from some steps."""
        self._added.append(pairs)

    def means(self) -> dict[str, float]:
        """Divides each sum by its weight, in float64.

        Returns:
            The means by name, in the unit of the sums; a metric whose weight is 0 is absent.
        """
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for pairs in jax.device_get(self._added):
            for name, (total, weight) in pairs.items():
                sums[name] = sums.get(name, 0.0) + float(total)
                weights[name] = weights.get(name, 0.0) + float(weight)
        return {name: sums[name] / weights[name] for name in sums if weights[name] != 0}


class JsonlWriter:
    """Appends one JSON object a line: `{"step": 10, "loss": 2.5}`.

    A value that is not finite is written as null: JSON has no other word for it.
    """

    def __init__(self, path: str | os.PathLike[str], *, restored_step: int | None = None) -> None:
        """Opens the file and drops the lines of steps that will be made again.

        Args:
            path: created, with its directory, where missing.
            restored_step: of the checkpoint that the run goes on from: lines of later steps are
                dropped, and a last one cut off by a kill. None for a run from its start: every line
                is dropped.

        Raises:
            InputError: where a line before the last is not a JSON object with a step.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if restored_step is None else _lines_up_to(path, restored_step)
        partial = path.with_name(path.name + '.partial')
        partial.write_text(''.join(kept), encoding='utf-8')
        partial.replace(path)
        self._file = path.open('a', encoding='utf-8')

    def write(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Appends one line, and flushes it; texts are written as they are."""
        values = {name: _as_json(value) for name, value in metrics.items()}
        self._file.write(json.dumps({'step': int(step), **values}, allow_nan=False) + '\n')
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _as_json(value: float | str) -> float | str | None:
    if isinstance(value, str | int):
        return value
    return float(value) if math.isfinite(value) else None


def _lines_up_to(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)['step'] <= step:
                kept.append(line.rstrip('\n') + '\n')
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise InputError(
                    f'{path}, line {number}, must be a JSON object with a "step"; received '
                    f'{line[:80]!r}. Remove the line, or move the file away, and start again.'
                ) from error
    return kept


def format_duration(seconds: float) -> str:
    """Formats a time in its two largest units: '8s', '1m 05s', '2h 03m', '3d 04h'."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f'{days}d {hours % 24:02d}h'
    if hours:
        return f'{hours}h {minutes % 60:02d}m'
    if minutes:
        return f'{minutes}m {whole % 60:02d}s'
    return f'{whole}s'


def format_quantity(value: float) -> str:
    """Formats a count or a rate in three digits: '8.25', '950', '12.3k', '1.25M', '3.00G'."""
    for scale, suffix in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= 0.9995 * scale:
            return f'{_three_digits(value / scale)}{suffix}'
    return _three_digits(value)


def _three_digits(value: float) -> str:
    if abs(value) >= 99.95:
        return f'{value:.0f}'
    return f'{value:.1f}' if abs(value) >= 9.995 else f'{value:.2f}'


def format_progress(
    stage: str,
    step: int,
    total_steps: int,
    *,
    loss: float | None = None,
    tokens_per_second: float | None = None,
    seconds_left: float | None = None,
) -> str:
    """Formats 'student  120/1,000  loss 2.3456  12.3k tokens/s  1m 05s left'.

    What is None is left out.
    """
    parts = [stage, f'{step:,}/{total_steps:,}']
    if loss is not None:
        parts.append(f'loss {loss:.4f}')
    if tokens_per_second is not None:
        parts.append(f'{format_quantity(tokens_per_second)} tokens/s')
    if seconds_left is not None:
        parts.append(f'{format_duration(seconds_left)} left')
    return '  '.join(parts)


class ProgressLine:
    """One line, rewritten in place, of a stage's progress; silent where the stream is no terminal.

    Rates and the time left are measured from the first `update` on, so that the first step's
    compilation is in neither.
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        stream: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes the line; nothing is written before the first `update`.

        Args:
            stage: its name, as shown.
            total_steps: of the stage.
            stream: usually `sys.stderr`.
            clock: seconds from any origin.
        """
        self._stage = stage
        self._total_steps = total_steps
        self._stream = stream
        self._clock = clock
        self._shown = stream.isatty()
        self._first: tuple[float, int, int] | None = None
        self._width = 0

    def update(self, step: int, *, tokens: int, loss: float | None = None) -> None:
        """Rewrites the line.

        Args:
            step: steps done.
            tokens: seen by this run so far.
            loss: to show, in nats per token.
        """
        if not self._shown:
            return
        now = self._clock()
        self._first = self._first or (now, step, tokens)
        start, first_step, first_tokens = self._first
        seconds, steps = now - start, step - first_step
        measured = seconds > 0 and steps > 0
        text = format_progress(
            self._stage,
            step,
            self._total_steps,
            loss=loss,
            tokens_per_second=(tokens - first_tokens) / seconds if measured else None,
            seconds_left=(self._total_steps - step) * seconds / steps if measured else None,
        )
        self._write(text)

    def say(self, what: str) -> None:
        """Rewrites the line with what the stage is at, where no step can be counted yet."""
        if self._shown:
            self._write(f'{self._stage}  {what}')

    def _write(self, text: str) -> None:
        self._stream.write('\r' + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def close(self) -> None:
        """Ends the line, where one was written."""
        if self._width:
            self._stream.write('\n')
            self._stream.flush()
            self._width = 0

    def __enter__(self) -> 'ProgressLine':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
