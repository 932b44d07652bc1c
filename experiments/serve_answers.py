"""Events of an engine into the JSON of OpenAI's completions and chat completions."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from distill.tokenizer import Tokenizer
from experiments.serve_requests import Asked
from experiments.text_stream import BROKEN, TextStream
from moe.requests import Event, Finish, Request, Token


class Choice:
    """One text of an answer, as it grows.

    Args:
        index: among the choices.
        request: that it answers.
        asked: what the body asked for.
        tokenizer: of the model.
    """

    def __init__(self, index: int, request: Request, asked: Asked, tokenizer: Tokenizer) -> None:
        self.index = index
        self.finish: Finish | None = None
        self.written = 0
        self._request = request
        self._asked = asked
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, asked.stops)
        self._started = False
        self._offset = 0
        self._pending: list[int] = []

    def add(self, event: Event) -> tuple[str, list[Token]]:
        """Returns the text and the tokens that an event adds."""
        text, tokens = '', []
        if not self._started and self._asked.echo:
            tokens += event.prompt or ()
            text += self._tokenizer.decode(self._request.prompt)
        self._started = self._started or event.token is not None or event.prompt is not None
        self.finish = event.finish
        if event.token is not None:
            self.written += 1
            # The id that ends a text is no part of it.
            ends = event.finish == 'stop'
            tokens += [] if ends else [event.token]
            new = self._stream.feed(event.token.id, last=event.finish is not None)
            text += new.lstrip(' ') if self._asked.chat and self.written == 1 else new
            if self._stream.stopped:
                self.finish = 'stop'
        return text, tokens

    def log_probs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Returns the log-probabilities of tokens as the body asked for them."""
        if not self._asked.log_probs:
            return None
        if self._asked.chat:
            return {'content': [self._chat_token(token) for token in tokens], 'refusal': None}
        top = self._request.top_log_probs
        return {
            'tokens': [self._name(token.id) for token in tokens],
            'token_logprobs': [token.log_prob for token in tokens],
            'top_logprobs': [
                {self._name(id_): value for id_, value in token.top} if token.top else None
                for token in tokens
            ]
            if top
            else None,
            'text_offset': [self._offset_of(token) for token in tokens],
        }

    def _offset_of(self, token: Token) -> int:
        """Where in the text a token starts; those of one character start where it does."""
        start = self._offset
        self._pending.append(token.id)
        text = self._tokenizer.decode(self._pending)
        if not text.endswith(BROKEN):
            self._offset += len(text)
            self._pending.clear()
        return start

    def _name(self, token: int) -> str:
        """The text of a token; its number where asked for, or where it is no text of its own."""
        text = self._tokenizer.decode([token])
        if self._asked.token_ids or not text or BROKEN in text:
            return f'token_id:{token}'
        return text

    def _chat_token(self, token: Token) -> dict[str, Any]:
        def entry(id_: int, value: float | None) -> dict[str, Any]:
            text = self._tokenizer.decode([id_])
            plain = bool(text) and BROKEN not in text
            name = self._name(id_)
            return {
                'token': name,
                'logprob': value,
                'bytes': list(text.encode()) if plain else None,
            }

        top = [entry(id_, value) for id_, value in token.top]
        return entry(token.id, token.log_prob) | {'top_logprobs': top}


class Answer:
    """What all parts of an answer to one body share.

    Args:
        asked: what the body asked for.
        model: its name.
        tokenizer: of the model.
    """

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer) -> None:
        self.asked = asked
        self.choices = [
            Choice(index, request, asked, tokenizer) for index, request in enumerate(asked.requests)
        ]
        self._kind = 'chat.completion' if asked.chat else 'text_completion'
        prefix = 'chatcmpl' if asked.chat else 'cmpl'
        self._head = {
            'id': f'{prefix}-{secrets.token_hex(12)}',
            'created': int(time.time()),
            'model': model,
        }

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish is not None for choice in self.choices)

    def whole(self, texts: Sequence[str], tokens: Sequence[Sequence[Token]]) -> dict[str, Any]:
        """Returns the answer at once."""
        choices = []
        for choice, text, own in zip(self.choices, texts, tokens, strict=True):
            content = (
                {'message': {'role': 'assistant', 'content': text, 'refusal': None}}
                if self.asked.chat
                else {'text': text}
            )
            choices.append(self._choice(choice, content, own))
        return self._head | {'object': self._kind, 'choices': choices, 'usage': self._usage()}

    def part(self, choice: Choice, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """Returns what one event adds, as a chunk of a stream."""
        if not self.asked.chat:
            content: dict[str, Any] = {'text': text}
        elif choice.written <= 1:
            content = {'delta': {'role': 'assistant', 'content': text}}
        else:
            content = {'delta': {'content': text} if text else {}}
        return self._chunk([self._choice(choice, content, tokens)])

    def last(self) -> dict[str, Any]:
        """Returns the chunk that counts the tokens."""
        return self._chunk([]) | {'usage': self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = 'chat.completion.chunk' if self.asked.chat else self._kind
        return self._head | {'object': kind, 'choices': choices}

    def _choice(
        self, choice: Choice, content: dict[str, Any], tokens: Sequence[Token]
    ) -> dict[str, Any]:
        return content | {
            'index': choice.index,
            'logprobs': choice.log_probs(tokens),
            'finish_reason': choice.finish,
        }

    def _usage(self) -> dict[str, int]:
        # A prompt counts once, however many texts continue it.
        prompts = dict.fromkeys(request.prompt for request in self.asked.requests)
        read, written = sum(map(len, prompts)), sum(choice.written for choice in self.choices)
        return {
            'prompt_tokens': read,
            'completion_tokens': written,
            'total_tokens': read + written,
        }
