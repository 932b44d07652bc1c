"""The HTTP application: OpenAI's routes over a worker, with limits, a key, health and metrics."""

import asyncio
import contextlib
import functools
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from distill.tokenizer import Tokenizer
from experiments.chat_prompts import ChatPrompts
from experiments.serve_answers import Answer
from experiments.serve_errors import ApiError, as_api_error
from experiments.serve_requests import Asked, read_chat, read_completion
from experiments.serve_worker import Sink, Ticket, Worker
from moe.requests import Event

MAX_BODY = 4 * 2**20  # bytes

Reader = Callable[[Any, Tokenizer, Any], Asked]
Events = asyncio.Queue[tuple[int, Event | None]]


class App:
    """Answers requests; `routes` makes it a Starlette application.

    Args:
        worker: that writes.
        tokenizer: of its model.
        name: of its model.
        key: that callers must have; None lets everyone.
        chat: that renders conversations; None for text as in training.
    """

    def __init__(
        self,
        worker: Worker,
        tokenizer: Tokenizer,
        name: str,
        key: str | None,
        chat: ChatPrompts | None = None,
    ) -> None:
        self._worker = worker
        self._tokenizer = tokenizer
        self._name = name
        self._key = key
        self._read_chat = functools.partial(read_chat, chat=chat)

    def application(self) -> Any:
        """Returns the ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        routes = [
            Route('/health', self._health),
            Route('/metrics', self._guarded(self._metrics)),
            Route('/v1/models', self._guarded(self._models)),
            Route('/v1/models/{name:path}', self._guarded(self._model)),
            Route('/v1/completions', self._guarded(self._completions), methods=['POST']),
            Route('/v1/chat/completions', self._guarded(self._chat), methods=['POST']),
        ]

        async def http_error(request: Any, error: Any) -> Any:
            what = f'{request.method} {request.url.path}: {error.detail}.'
            return _error(ApiError(what, error.status_code, code='unknown_url'))

        return Starlette(routes=routes, exception_handlers={HTTPException: http_error})

    def _guarded(self, handler: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        """Asks for the key, and answers errors as OpenAI does."""

        async def guarded(request: Any) -> Any:
            try:
                self._require_key(request.headers.get('authorization', ''))
                return await handler(request)
            except Exception as error:
                answer = as_api_error(error)
                if answer.status == 500:
                    raise
                return _error(answer)

        return guarded

    def _require_key(self, header: str) -> None:
        if self._key is None:
            return
        expected = f'Bearer {self._key}'
        # In constant time: how long a refusal takes says nothing of the key.
        if not hmac.compare_digest(header.encode(), expected.encode()):
            raise ApiError(
                'A valid key is required in the header "Authorization: Bearer KEY".',
                401,
                code='invalid_api_key',
            )

    async def _health(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        healthy = self._worker.healthy
        return JSONResponse({'status': 'ok' if healthy else 'failed'}, 200 if healthy else 503)

    async def _metrics(self, request: Any) -> Any:
        from starlette.responses import PlainTextResponse

        worker, counters = self._worker, self._worker.counters
        values = {
            'requests_total': counters.requests,
            'prompt_tokens_total': counters.prompt_tokens,
            'generated_tokens_total': counters.tokens,
            'cancelled_total': counters.cancelled,
            'rejected_total': counters.rejected,
            'requests_under_way': worker.under_way,
            'cache_bytes': worker.cache_use.bytes,
            'cache_pages': worker.cache_use.pages,
            'cache_pages_in_use': worker.cache_use.pages_in_use,
        }
        lines = []
        for name, value in values.items():
            kind = 'counter' if name.endswith('_total') else 'gauge'
            lines += [f'# TYPE fractional_{name} {kind}', f'fractional_{name} {value}']
        return PlainTextResponse('\n'.join(lines) + '\n')

    async def _models(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({'object': 'list', 'data': [self._description()]})

    async def _model(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        self._require_model(request.path_params['name'])
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        return {
            'id': self._name,
            'object': 'model',
            'created': 0,
            'owned_by': 'fractional',
            'max_model_len': self._worker.config.max_length,
        }

    def _require_model(self, name: str) -> None:
        if name != self._name:
            raise ApiError(
                f'There is no model {name!r}; this is {self._name!r}.',
                404,
                'model',
                'model_not_found',
            )

    async def _completions(self, request: Any) -> Any:
        return await self._answer(request, read_completion)

    async def _chat(self, request: Any) -> Any:
        return await self._answer(request, self._read_chat)

    async def _answer(self, request: Any, read: Reader) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        if not self._worker.healthy:
            raise ApiError('The engine has failed; restart the server.', 503)
        asked = read(body := await _json(request), self._tokenizer, self._worker.config)
        self._require_model(body['model'])
        answer, events = Answer(asked, self._name, self._tokenizer), Events()
        sinks = [_sink(events, choice.index) for choice in answer.choices]
        tickets = self._worker.submit(list(asked.requests), sinks)
        if asked.stream:
            stream = self._streamed(answer, events, tickets)
            return StreamingResponse(stream, media_type='text/event-stream')
        whole = asyncio.create_task(self._whole(answer, events, tickets))
        gone = asyncio.create_task(_gone(request))
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not whole.done():
            whole.cancel()
            raise ApiError('The caller has gone.', 499)
        return JSONResponse(await whole)

    async def _parts(
        self, answer: Answer, events: Events, tickets: list[Ticket]
    ) -> AsyncGenerator[tuple[Any, str, list[Any]], None]:
        """Yields choice, text and tokens of each event; whatever ends this frees the rows."""
        try:
            while not answer.complete:
                index, event = await events.get()
                choice = answer.choices[index]
                if event is None:
                    raise ApiError('The engine has failed; restart the server.', 503)
                if choice.finish is not None:
                    continue  # its text came to a stop string
                text, tokens = choice.add(event)
                if choice.finish is not None and event.finish is None:
                    self._worker.cancel(tickets[index])
                yield choice, text, tokens
        finally:
            for choice, ticket in zip(answer.choices, tickets, strict=True):
                if choice.finish is None:
                    self._worker.cancel(ticket)

    async def _whole(self, answer: Answer, events: Events, tickets: list[Ticket]) -> dict[str, Any]:
        texts = [''] * len(tickets)
        tokens: list[list[Any]] = [[] for _ in tickets]
        async with contextlib.aclosing(self._parts(answer, events, tickets)) as parts:
            async for choice, text, new in parts:
                texts[choice.index] += text
                tokens[choice.index] += new
        return answer.whole(texts, tokens)

    async def _streamed(
        self, answer: Answer, events: Events, tickets: list[Ticket]
    ) -> AsyncIterator[str]:
        try:
            async with contextlib.aclosing(self._parts(answer, events, tickets)) as parts:
                async for choice, text, tokens in parts:
                    if text or tokens or choice.finish or choice.written == 1:
                        yield _line(answer.part(choice, text, tokens))
        except ApiError as error:
            yield _line(error.body())
            return
        if answer.asked.usage:
            yield _line(answer.last())
        yield 'data: [DONE]\n\n'


def _sink(events: Events, index: int) -> Sink:
    """Brings events from the engine's thread to the one that answers."""
    loop = asyncio.get_running_loop()

    def sink(event: Event | None) -> None:
        # The loop may have been closed by a server that is stopped.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    return sink


def _line(values: dict[str, Any]) -> str:
    return f'data: {json.dumps(values, allow_nan=False)}\n\n'


def _error(error: ApiError) -> Any:
    from starlette.responses import JSONResponse

    headers = {'Retry-After': '1'} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


async def _json(request: Any) -> Any:
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > MAX_BODY:
            raise ApiError(
                f'A body may have at most {MAX_BODY} bytes. Send less at once.',
                413,
                code='body_too_large',
            )
    try:
        return json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise ApiError(f'The body must be JSON: {error}.') from error


async def _gone(request: Any) -> None:
    """Returns when the caller has hung up."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.05)
