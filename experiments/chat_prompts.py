"""Conversations as prompts, rendered by the chat template of a published model's folder."""

import json
import pathlib

from distill.chat_template import ChatTemplate, has_template
from distill.formats import text_messages
from distill.pretrained_tokenizer import PretrainedTokenizer
from distill.tokenizer import Tokenizer
from experiments.loaded import Loaded
from moe.errors import InputError


class ChatPrompts:
    """Renders conversations up to where the model's answer begins.

    Args:
        tokenizer: of a folder with a template.

    Attributes:
        template: of the folder.
        stop_ids: tokens that end an answer: that of the end of a text, and those that the folder's
            generation_config.json names, since of some models a turn ends with another.

    Raises:
        InputError: as `ChatTemplate`.
    """

    def __init__(self, tokenizer: PretrainedTokenizer) -> None:
        self.template = ChatTemplate(tokenizer.folder)
        self._tokenizer = tokenizer
        self.stop_ids = _stop_ids(tokenizer.folder / 'generation_config.json', tokenizer)

    def encode(self, messages: list, where: str) -> tuple[int, ...]:
        """Encodes a conversation; the template writes the special tokens, `bos` among them.

        Args:
            messages: as in `distill.formats.text_messages`.
            where: what they are called in an error.

        Raises:
            InputError: where a message is none, or the template refuses the conversation.
            UnicodeEncodeError: where half of a surrogate pair is in it, which is no text.
        """
        text = self.template.render(text_messages(messages, where), add_generation_prompt=True)
        text.encode()
        return tuple(self.encode_rendered(text))

    def encode_rendered(self, text: str) -> list[int]:
        """Encodes what the template wrote; nothing is put before it."""
        return self._tokenizer.encode_rendered(text).tolist()


def chat_prompts(loaded: Loaded) -> ChatPrompts | None:
    """Returns how a model's conversations are rendered; None is as in training.

    Raises:
        InputError: where the template cannot be read, or the extra `chat` is not installed.
    """
    if loaded.published is None or not has_template(loaded.published):
        return None
    assert isinstance(loaded.tokenizer, PretrainedTokenizer)
    return ChatPrompts(loaded.tokenizer)


def required_chat(tokenizer: Tokenizer) -> ChatPrompts:
    """Returns how conversations are rendered for a model with this tokenizer.

    Raises:
        InputError: as `ChatPrompts`, and where it is no published model's.
    """
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise InputError(
            'A conversation needs the tokenizer of a published model, in a folder with a chat '
            f'template; received one of kind {tokenizer.kind!r}. Ask in plain text, with '
            'config.exams.chat=False, or without --chat.'
        )
    return ChatPrompts(tokenizer)


def _stop_ids(file: pathlib.Path, tokenizer: PretrainedTokenizer) -> tuple[int, ...]:
    named = json.loads(file.read_text()).get('eos_token_id') if file.is_file() else None
    ids = named if isinstance(named, list) else [] if named is None else [named]
    # The engine writes no ids past the tokenizer's.
    known = (id_ for id_ in ids if id_ < tokenizer.vocab_size)
    return tuple(dict.fromkeys((tokenizer.eos_id, *known)))
