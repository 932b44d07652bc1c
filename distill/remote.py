"""A server that speaks OpenAI's protocol: a request, and what became of it."""

import asyncio
import dataclasses
import functools
import hashlib
import importlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

from distill.backoff import retry_after
from moe.errors import InputError
from moe.validation import require

Path = Literal['completions', 'chat/completions']
Kind = Literal['answer', 'refused', 'lost', 'rejected', 'denied']

KEY_BYTES = 16
# The client wants a key even where the server does not.
_NO_KEY = 'none'
# Answers that say: not now. Whoever gives one has not done the work.
_LATER = (408, 409, 425, 429)
# Answers to any request alike: the key, the address or the name of the model is wrong.
_FOR_ALL = (401, 402, 403, 404)
# Of a connection that did not come about, so that nothing was sent.
_NEVER_SENT = ('ConnectError', 'ConnectTimeout', 'PoolTimeout')


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked once, whatever happens.

    Attributes:
        path: below the server's base URL.
        body: as JSON, without the model.
        prompt_tokens: that the prompt has at most.
        new_tokens: that are written to it at most.
        occurrence: tells requests with the same body apart.
    """

    path: Path
    body: Mapping[str, Any]
    prompt_tokens: int
    new_tokens: int
    occurrence: int = 0

    @functools.cached_property
    def key(self) -> str:
        """A hash of what is asked, the same in every run."""
        content = json.dumps([self.path, self.body, self.occurrence], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=KEY_BYTES).hexdigest()


@dataclasses.dataclass(frozen=True)
class Reply:
    """What became of a request.

    Attributes:
        kind: 'answer'; 'refused', to be sent again later, and not charged; 'lost', to be sent
            again, though it may have been done and charged; 'rejected', never to be sent again;
            'denied', as any other request would be.
        text: of the answer, or the reason.
        wait: seconds that the server wants to be left alone; None where it does not say.
    """

    kind: Kind
    text: str
    wait: float | None = None


@dataclasses.dataclass(frozen=True)
class RemoteServer:
    """Where a teacher is, and how to ask it.

    Attributes:
        base_url: such as 'https://host/v1'; holds neither key nor name of a user.
        model: as the server calls it.
        key: sent with each request and shown nowhere; None where the server wants none.
        timeout: seconds from sending a request to the end of its answer.
    """

    base_url: str
    model: str
    key: str | None = dataclasses.field(default=None, repr=False)
    timeout: float = 120.0

    def __post_init__(self) -> None:
        require_plain_url(self.base_url)
        require(self.timeout > 0, 'timeout', 'positive seconds', self.timeout)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator['Connection']:
        """Opens connections, for as long as the block lasts.

        Raises:
            InputError: where the extra `api` is not installed.
        """
        openai = _openai()
        client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.key or _NO_KEY,
            timeout=self.timeout,
            max_retries=0,
        )
        try:
            yield Connection(self, client, openai)
        finally:
            await client.close()


class Connection:
    """Sends requests, each once: to send it again is for the caller, who keeps the books.

    Args:
        server: that is asked.
        client: of the library `openai`.
        openai: that library.
    """

    def __init__(self, server: RemoteServer, client: Any, openai: Any) -> None:
        self._server = server
        self._client = client
        self._openai = openai

    async def send(self, request: Request) -> Reply:
        """Sends a request and waits for its end; the reply holds no key."""
        try:
            async with asyncio.timeout(self._server.timeout):
                answer = await self._post(request)
            return Reply('answer', answer.text)
        except (TimeoutError, self._openai.APITimeoutError) as error:
            kind = 'refused' if _never_sent(error) else 'lost'
            return Reply(kind, f'no answer within {self._server.timeout} seconds')
        except self._openai.APIStatusError as error:
            return self._status(error)
        except self._openai.APIConnectionError as error:
            kind = 'refused' if _never_sent(error) else 'lost'
            return Reply(kind, self.without_key(f'the connection failed: {_cause(error)}'))

    async def _post(self, request: Request) -> Any:
        client = self._client
        body = dict(request.body)
        # A server that knows the header gives the same answer again and charges it once.
        how = {'extra_headers': {'Idempotency-Key': request.key}, 'model': self._server.model}
        if request.path == 'completions':
            create, prompt = client.completions.with_raw_response.create, 'prompt'
        else:
            create, prompt = client.chat.completions.with_raw_response.create, 'messages'
        return await create(**{prompt: body.pop(prompt)}, **how, extra_body=body)

    def _status(self, error: Any) -> Reply:
        status, reason = error.status_code, self.without_key(f'{error.status_code}: {error}'[:500])
        headers = {name.lower(): value for name, value in error.response.headers.items()}
        out_of_money = getattr(error, 'code', None) == 'insufficient_quota'
        if status in _FOR_ALL or out_of_money:
            return Reply('denied', reason)
        if status in _LATER or status >= 500:
            return Reply('refused', reason, retry_after(headers))
        return Reply('rejected', reason)

    def without_key(self, text: str) -> str:
        """Returns a text as it may be shown."""
        return text.replace(self._server.key, '***') if self._server.key else text


def require_plain_url(base_url: str) -> None:
    """Refuses an address that is none, or that holds a secret: it is written into files.

    Raises:
        InputError: without the address where it may hold a secret.
    """
    parts = urlsplit(base_url)
    if parts.username is not None or parts.password is not None or parts.query:
        raise InputError(
            'base_url must be an address without a user, a password or a query: it is written into '
            'files. Put the key into an environment variable, and name that.'
        )
    valid = parts.scheme in ('http', 'https') and bool(parts.hostname)
    require(valid, 'base_url', "an address such as 'https://host/v1'", base_url)


def _never_sent(error: BaseException) -> bool:
    return type(error.__cause__).__name__ in _NEVER_SENT


def _cause(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f'{type(cause).__name__} {cause}'.strip()


def _openai() -> Any:
    try:
        return importlib.import_module('openai')
    except ImportError as error:
        raise InputError(
            'A remote teacher is asked through the library openai, which is not installed; it '
            "comes with the extra 'api': pip install 'fractional[api]'."
        ) from error
