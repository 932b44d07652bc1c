"""What was asked of a remote teacher and what it answered: a journal that survives a kill.

    {"ledger": 1, "terms": {...}}                            whose answers these are
    {"asked": KEY, "most": [tokens, dollars]}                durable before the request is sent
    {"ended": KEY, "as": OUTCOME, "cost": [...], ...}        durable before the answer is used

A request that is 'answered' or 'quarantined' is never sent again. One that was 'refused' (too many
requests, a server that failed) or 'lost' (no answer came) is. One that was asked and has not ended
was under way at a kill: it may have been paid for, so it counts as lost, at the most it can cost.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, get_args

from distill.budget import Cost
from distill.nested import flatten
from moe.errors import InputError

FORMAT = 1
Outcome = Literal['answered', 'quarantined', 'refused', 'lost']
_FINAL = ('answered', 'quarantined')


@dataclasses.dataclass(frozen=True)
class _Place:
    outcome: str
    offset: int
    length: int


class AnswerLedger:
    """A journal that one process at a time appends to; each line is durable when its call returns.

    Args:
        file: there or not; its folder is made.
        terms: what all answers depend on besides the requests, as JSON; those of a file that is
            there must be the same.

    Attributes:
        spent: by every request that has ended, and by those that a kill cut off.
        cut_off: keys of the latter that had not been asked again when the file was opened.

    Raises:
        InputError: the file was kept for other terms (names them), is damaged before its last line,
            or another process has it open.
    """

    def __init__(self, file: str | os.PathLike, terms: Mapping[str, Any]) -> None:
        self._path = pathlib.Path(file)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        created = not self._path.exists()
        self._file = self._path.open('a+b')
        try:
            self._lock()
            self._places: dict[str, _Place] = {}
            self.spent = Cost()
            self.cut_off: frozenset[str] = frozenset()
            self._end = self._read(json.loads(json.dumps(dict(terms))))
            if self._end == 0:
                self._append({'ledger': FORMAT, 'terms': dict(terms)})
            if created:
                _sync_directory(self._path.parent)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> 'AnswerLedger':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process open it."""
        self._file.close()

    def outcome(self, key: str) -> str | None:
        """Returns 'answered' or 'quarantined' of a request that is never sent again, else None."""
        place = self._places.get(key)
        return None if place is None else place.outcome

    def entry(self, key: str) -> dict[str, Any]:
        """Reads what is kept of a request with an outcome: `record` of an answer, or `reason`."""
        place = self._places[key]
        line = os.pread(self._file.fileno(), place.length, place.offset)
        return json.loads(line)

    def asked(self, key: str, most: Cost) -> None:
        """Notes that a request is about to be sent.

        Args:
            key: of the request.
            most: that it can cost.
        """
        self._append({'asked': key, 'most': [most.tokens, most.dollars]})

    def ended(self, key: str, outcome: Outcome, cost: Cost, **kept: Any) -> None:
        """Notes how a request ended.

        Args:
            key: of the request, that was `asked`.
            outcome: 'answered' or 'quarantined' end it for good.
            cost: that is certain, or the most where nothing is.
            kept: what else the line holds, as JSON.
        """
        line = {'ended': key, 'as': outcome, 'cost': [cost.tokens, cost.dollars], **kept}
        offset = self._end
        length = self._append(line)
        self._note(line, offset, length)

    def _append(self, values: Mapping[str, Any]) -> int:
        line = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b'\n'
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            # What was written in part would spoil the line after it.
            os.truncate(self._path, self._end)
            raise
        self._end += len(line)
        return len(line)

    def _lock(self) -> None:
        import fcntl  # which not every system has that this package is imported on

        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f'{self._path} is open in another process, which asks the same teacher. Wait until '
                'it has ended, or give this one another workdir.'
            ) from error

    def _read(self, terms: Mapping[str, Any]) -> int:
        """Reads every whole line; cuts off what a kill left of the last one."""
        self._file.seek(0)
        offset = 0
        under_way: dict[str, Cost] = {}
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b'\n'):
                os.truncate(self._path, offset)
                break
            try:
                values = json.loads(line)
                if number == 1:
                    self._require_same(values['terms'], terms)
                elif 'asked' in values:
                    # Asked again without having ended: a kill came between.
                    self.spent += under_way.get(values['asked'], Cost())
                    under_way[values['asked']] = Cost(*values['most'])
                else:
                    under_way.pop(values['ended'], None)
                    self._note(values, offset, len(line))
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f'{self._path}, line {number}: must be a line of the ledger of a remote '
                    f'teacher; it cannot be read ({error!r}). Bring the file back from a copy: '
                    'without it, what was paid for would be paid for again.'
                ) from error
            offset += len(line)
        self.cut_off = frozenset(under_way)
        self.spent = sum(under_way.values(), start=self.spent)
        return offset

    def _note(self, values: Mapping[str, Any], offset: int, length: int) -> None:
        key, outcome, cost = values['ended'], values['as'], Cost(*values['cost'])
        if outcome not in get_args(Outcome):
            raise ValueError(f'there is no outcome {outcome!r}')
        self.spent += cost
        if outcome in _FINAL:
            self._places[key] = _Place(outcome, offset, length)

    def _require_same(self, saved: Mapping[str, Any], terms: Mapping[str, Any]) -> None:
        there, here = flatten(dict(saved)), flatten(dict(terms))
        keys = sorted(key for key in there | here if there.get(key) != here.get(key))
        if keys:
            lines = [f'  {key}: {there.get(key)!r} there, {here.get(key)!r} here' for key in keys]
            raise InputError(
                '\n'.join(
                    [
                        f'{self._path} holds answers that were given under other terms:',
                        *lines,
                        'Use those, or another workdir: answers are never mixed.',
                    ]
                )
            )


def _sync_directory(folder: pathlib.Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
