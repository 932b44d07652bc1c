"""A model that sits an exam: it says how likely it holds answers, or writes its own."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from distill.scoring import Scored, score
from distill.tokenizer import Tokenizer
from experiments.chat_prompts import ChatPrompts
from experiments.text_stream import TextStream
from moe.engine import Engine
from moe.errors import InputError
from moe.filling import batch_shards
from moe.requests import EngineConfig, Request
from moe.sampling import Sampling
from moe.transformer import Transformer

GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Question:
    """A text that is to be continued.

    Attributes:
        text: that is.
        max_new_tokens: of the answer.
        stops: strings that end it, and are not part of it.
        sampling: how it is drawn.
        seed: in [0, 2**32).
        rendered: whether a chat template wrote it.
    """

    text: str
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    seed: int = 0
    rendered: bool = False


class Examinee:
    """A model with its tokenizer.

    Every text begins with `bos`, as the documents it has learnt, but what a chat template wrote:
    that has its special tokens spelt out in it, and ends where the template says.

    Args:
        model: with a subtree for each layer, or a stack of them.
        variables: of the model.
        tokenizer: that it was trained with.
        rows: texts that are run at once; rounded up to what the mesh splits a batch into.
        max_length: tokens of a question and its answer.
        chat: how conversations are rendered, where some are asked.
    """

    def __init__(
        self,
        model: Transformer,
        variables: Any,
        tokenizer: Tokenizer,
        *,
        rows: int,
        max_length: int,
        chat: ChatPrompts | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.max_length = max_length
        self._model = model
        self._variables = variables
        self._rows = rows + -rows % batch_shards(model.mesh)

    def encode(self, text: str, *, rendered: bool = False) -> list[int]:
        """Encodes a text that begins a document, or one that the chat template wrote."""
        if rendered:
            assert self.chat is not None
            return self.chat.encode_rendered(text)
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text).tolist()]

    def split(
        self, context: str, continuation: str, *, rendered: bool = False
    ) -> tuple[list[int], list[int]]:
        """Encodes a context and what follows it; spaces between them belong to what follows.

        The ids of the continuation are those of the whole text past the context's own, so that a
        word is cut as it is in running text.
        """
        spaces = len(context) - len(context.rstrip(' '))
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.encode(context, rendered=rendered)
        return before, self.encode(context + continuation, rendered=rendered)[len(before) :]

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """Scores continuations of contexts, ids both.

        Raises:
            InputError: where some are longer than `max_length`.
        """
        self._require_room([len(context) + len(rest) for context, rest in pairs])
        return score(
            self._model,
            self._variables,
            pairs,
            batch_size=self._rows,
            vocab_size=self.tokenizer.vocab_size,
        )

    def write(self, questions: Sequence[Question]) -> list[str]:
        """Answers questions, with as many rows as there are kept full.

        Raises:
            InputError: where some are longer than `max_length`, answer and all.
        """
        config = EngineConfig(self._rows, self.max_length, max_waiting=self._rows)
        vocab_size = self.tokenizer.vocab_size
        engine = Engine(self._model, self._variables, config, vocab_size=vocab_size)
        requests = [self._request(question) for question in questions]
        self._require_room([len(r.prompt) + r.max_new_tokens for r in requests])
        waiting = collections.deque(enumerate(zip(questions, requests, strict=True)))
        texts, streams = [''] * len(questions), {}
        while waiting or streams:
            while waiting and len(streams) < 2 * self._rows:
                place, (question, request) = waiting.popleft()
                stream = TextStream(self.tokenizer, question.stops)
                streams[engine.submit(request)] = (place, stream)
            for event in engine.step():
                assert event.token is not None
                place, stream = streams[event.request]
                texts[place] += stream.feed(event.token.id, last=event.finish is not None)
                if stream.stopped or event.finish:
                    engine.cancel(event.request)
                    del streams[event.request]
        return texts

    def _request(self, question: Question) -> Request:
        ends = (self.tokenizer.eos_id,)
        if question.rendered and self.chat is not None:
            ends = self.chat.stop_ids
        return Request(
            prompt=tuple(self.encode(question.text, rendered=question.rendered)),
            max_new_tokens=question.max_new_tokens,
            sampling=question.sampling,
            stop_ids=ends,
            seed=question.seed,
        )

    def _require_room(self, lengths: Sequence[int]) -> None:
        longer = [length for length in lengths if length > self.max_length]
        if longer:
            raise InputError(
                'A question and its answer must take at most max_length='
                f'{self.max_length} tokens; {len(longer)} of {len(lengths)} take more, up to '
                f'{max(longer)}. Raise max_length, or ask for fewer shots; nothing is cut off.'
            )
