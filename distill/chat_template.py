"""Conversations as the text that a published model was trained on: its folder's chat template."""

import hashlib
import importlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from moe.errors import InputError

# Where a turn is cut off: a code point that is no character, and so of no text.
_CUT = '\ufdd0'


class ChatTemplate:
    """A folder's chat template.

    Templates are code of the folder's author; they run in Jinja's sandbox, which lets them build
    text and nothing else.

    Args:
        path: a folder with chat_template.jinja, or a tokenizer_config.json that holds one.

    Attributes:
        source: the template itself.
        fingerprint: of the template and the special tokens that it writes.

    Raises:
        InputError: where there is no template, it cannot be read, or the extra `chat` is not
            installed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        folder = pathlib.Path(path)
        settings = _settings(folder)
        source = _source(folder, settings)
        if source is None:
            raise InputError(
                f'{folder} must have a chat template, in chat_template.jinja or in '
                'tokenizer_config.json; it has none. Give plain text to this model, or add the '
                'template that it was trained with.'
            )
        # A token that a folder leaves null is undefined, and written as nothing.
        named = {
            name: token.get('content') if isinstance(token, dict) else token
            for name, token in settings.items()
            if name.endswith('_token')
        }
        self._tokens = {name: token for name, token in named.items() if isinstance(token, str)}
        self._template = _compile(source, folder)
        self.source: str = source
        content = json.dumps([source, self._tokens], sort_keys=True)
        self.fingerprint: str = hashlib.sha256(content.encode()).hexdigest()

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """Renders a conversation; special tokens are spelt out in it.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: whether to end where the model's answer begins.

        Raises:
            InputError: where the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                # As `transformers` renders: there, and none.
                tools=None,
                documents=None,
                **self._tokens,
            )
        except Exception as error:  # the template's code may fail in any way
            raise InputError(
                f'The chat template does not take this conversation: {error}. Change its roles or '
                'their order.'
            ) from error

    def render_begun(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Renders a conversation up to the end of its last content, which the model goes on with.

        Args:
            messages: as of `render`.

        Raises:
            InputError: where the template refuses the conversation, or leaves its end out.
        """
        *before, last = messages
        text = self.render([*before, {**last, 'content': f'{last["content"]}{_CUT}'}])
        begun, cut, _ = text.rpartition(_CUT)
        if not cut:
            raise InputError(
                'A chat template must write the last turn for the model to go on with it; this one '
                f'leaves out that of {last["role"]!r}. Ask without the beginning of an answer.'
            )
        return begun


def has_template(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has a chat template."""
    folder = pathlib.Path(path)
    return _source(folder, _settings(folder)) is not None


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the settings, and the special tokens where they are in a file of their own."""
    files = (folder / name for name in ('special_tokens_map.json', 'tokenizer_config.json'))
    read = [json.loads(file.read_text()) for file in files if file.is_file()]
    return {name: value for values in read for name, value in values.items()}


def _source(folder: pathlib.Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / 'chat_template.jinja'
    if file.is_file():
        return file.read_text()
    source = settings.get('chat_template')
    if isinstance(source, list):  # several, by name
        named = {entry['name']: entry['template'] for entry in source}
        source = named.get('default')
    return source if isinstance(source, str) else None


def _compile(source: str, folder: pathlib.Path) -> Any:
    try:
        jinja2 = importlib.import_module('jinja2')
        sandbox = importlib.import_module('jinja2.sandbox')
    except ImportError as error:
        raise InputError(
            "Chat templates need the extra 'chat': pip install 'fractional[chat]'."
        ) from error

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
    )
    environment.globals |= {
        'raise_exception': refuse,
        'strftime_now': lambda form: datetime.now().strftime(form),
    }
    # As published templates expect: no HTML escapes.
    environment.filters['tojson'] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise InputError(f'The chat template in {folder} is no Jinja template: {error}.') from error
