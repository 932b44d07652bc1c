"""A file of prompts, and the file of what was written to them, which survives a kill."""

import dataclasses
import hashlib
import json
import os
import pathlib
from types import TracebackType
from typing import Any

from distill.formats import message_text, record_text
from experiments.text_stream import TextStream
from experiments.workdir import read_json, write_json
from moe.errors import InputError
from moe.requests import Finish, Token


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A line of the file of prompts.

    Attributes:
        line: its number, from 1.
        text: what is to be continued; of a conversation, as it is rendered in training.
        id: given back beside the text; None where there is none.
        messages: of a conversation; None of a text.
    """

    line: int
    text: str
    id: Any = None
    messages: list[dict[str, Any]] | None = None


def read_prompts(path: pathlib.Path, field: str | None = None) -> list[Prompt]:
    """Reads every prompt of a `.jsonl` file; blank lines are none.

    Args:
        path: of the file.
        field: of its rows, see `distill.formats.record_text`, whose text is to be continued; None
            for rows with `prompt` or `messages`.

    Raises:
        InputError: naming every line that is no prompt, or where there is no prompt at all.
    """
    prompts, broken = [], []
    for number, line in enumerate(path.read_bytes().split(b'\n'), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt(number, json.loads(line.decode()), field))
        except ValueError as error:  # of json, of utf-8, or an InputError
            broken.append(f'  line {number}: {error}')
    if broken:
        more = [f'  ... and {len(broken) - 16} more'] if len(broken) > 16 else []
        lines = '\n'.join([*broken[:16], *more])
        required = "'prompt' or 'messages'" if field is None else f'the fields of {field!r}'
        raise InputError(
            f'{path}: every line must be a JSON object with {required}:\n{lines}\n'
            'Mend or remove them; nothing was written.'
        )
    if not prompts:
        raise InputError(f'{path} must hold prompts; it has no line that is not blank.')
    return prompts


def _prompt(number: int, record: Any, field: str | None) -> Prompt:
    if field is not None:
        return Prompt(number, record_text(record, field, 'it'), record.get('id'))
    if not isinstance(record, dict) or ('prompt' in record) == ('messages' in record):
        raise InputError("it has not one of 'prompt' and 'messages'")
    unknown = sorted(set(record) - {'prompt', 'messages', 'id'})
    if unknown:
        raise InputError(f'it has {", ".join(map(repr, unknown))}, which means nothing here')
    if 'messages' in record:
        messages = record['messages']
        text = message_text(messages, 'its messages')
        text.encode()  # half of a surrogate pair is a ValueError
        return Prompt(number, text, record.get('id'), messages)
    text = record['prompt']
    if not isinstance(text, str):
        raise InputError(f"its 'prompt' is no string but {type(text).__name__}")
    text.encode()
    return Prompt(number, text, record.get('id'))


class Job:
    """A prompt that is being continued.

    Args:
        prompt: that is.
        stream: of its text.
    """

    def __init__(self, prompt: Prompt, stream: TextStream) -> None:
        self.prompt = prompt
        self._stream = stream
        self._text = ''
        self._tokens: list[Token] = []
        self._finish: Finish | None = None

    def add(self, token: Token, finish: Finish | None) -> bool:
        """Adds a token; returns whether it was the last."""
        self._tokens.append(token)
        self._text += self._stream.feed(token.id, last=finish is not None)
        self._finish = 'stop' if self._stream.stopped else finish
        return self._finish is not None

    def record(self) -> dict[str, Any]:
        """Returns the line that is written of it."""
        return {
            'line': self.prompt.line,
            **({} if self.prompt.id is None else {'id': self.prompt.id}),
            'text': self._text,
            'finish': self._finish,
            'tokens': [token.id for token in self._tokens],
            'log_probs': [token.log_prob for token in self._tokens],
        }


class Results:
    """The output: a line for each prompt that is done, and beside it what it was made of and how.

    Args:
        path: of the file; `.run.json` is appended for the other.
        prompts: all of them.
        settings: what decides the texts.

    Raises:
        InputError: where the file holds texts of other prompts or settings, or is none of ours.
    """

    def __init__(self, path: pathlib.Path, prompts: list[Prompt], settings: dict[str, Any]) -> None:
        content = json.dumps([dataclasses.astuple(prompt) for prompt in prompts])
        self._values = settings | {'prompts': hashlib.sha256(content.encode()).hexdigest()}
        self._path = path
        self._require_same(path.with_name(path.name + '.run.json'))
        self._file = path.open('ab')
        self.done = self._read({prompt.line for prompt in prompts})

    def __enter__(self) -> 'Results':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, job: Job) -> None:
        """Writes a prompt's line, whole before anything else is done."""
        line = json.dumps(job.record(), ensure_ascii=False, allow_nan=False) + '\n'
        self._file.write(line.encode())
        self._file.flush()
        self.done.add(job.prompt.line)

    def _require_same(self, record: pathlib.Path) -> None:
        if not record.exists():
            if self._path.exists() and self._path.stat().st_size:
                raise InputError(
                    f'{self._path} is there already and was not written by this command; '
                    f'{record.name} is missing. Choose another --out.'
                )
            write_json(record, self._values)
            return
        saved = read_json(record)
        keys = sorted(k for k in saved | self._values if saved.get(k) != self._values.get(k))
        if keys:
            raise InputError(
                f'{self._path} was begun with another {", ".join(keys)}. Use what it was begun '
                f'with, or choose another --out, or delete it and {record.name}.'
            )

    def _read(self, known: set[int]) -> set[int]:
        """Reads which lines are done; what a kill left of a last one is cut off."""
        content = self._path.read_bytes()
        whole = content.rfind(b'\n') + 1
        os.truncate(self._path, whole)
        try:
            done = {json.loads(line)['line'] for line in content[:whole].splitlines()}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{self._path} has a line that this command did not write ({error}). Choose '
                'another --out.'
            ) from error
        return done & known
