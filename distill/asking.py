"""Asks a remote teacher many things: a few at a time, each until it is answered, in a budget."""

import asyncio
import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distill.answer_ledger import AnswerLedger
from distill.backoff import Backoff
from distill.budget import Budget, Cost, Limits
from distill.remote import Connection, RemoteServer, Reply, Request
from moe.errors import InputError
from moe.validation import require

# Of an answer that is quarantined, what is kept to look at.
KEPT_CHARACTERS = 2000


class MalformedError(Exception):
    """An answer that is not what was asked for; the message is the reason."""


class RemoteError(InputError):
    """The server cannot be asked: nothing that is tried again would help."""


Read = Callable[[Request, dict[str, Any]], Any]


@dataclasses.dataclass
class Tally:
    """What became of the requests of one call.

    Attributes:
        answered: now.
        quarantined: now, with the reason in the ledger.
        given_up: sent as often as is allowed; the next call sends them again.
    """

    answered: int = 0
    quarantined: int = 0
    given_up: int = 0


@dataclasses.dataclass(frozen=True)
class Manner:
    """How a teacher is asked.

    Attributes:
        concurrency: requests at one time.
        backoff: waits between attempts.
        limits: of what all requests in the ledger cost together.
    """

    concurrency: int = 8
    backoff: Backoff = Backoff()  # noqa: RUF009  frozen
    limits: Limits = Limits()  # noqa: RUF009  frozen

    def __post_init__(self) -> None:
        require(self.concurrency >= 1, 'concurrency', 'at least 1', self.concurrency)

    @property
    def patience(self) -> int:
        """Requests in a row that may come to nothing before none is sent any more."""
        return max(16, 2 * self.concurrency)


def ask_all(
    server: RemoteServer,
    requests: Iterable[Request],
    ledger: AnswerLedger,
    read: Read,
    manner: Manner,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Asks what the ledger has no outcome of; what is said is in the ledger when this returns.

    A request is written into the ledger before it is sent, and its outcome before anything else is
    done with it, so that no answer is paid for again after a kill, but those that were under way:
    they carry the same `Idempotency-Key`, by which a server can tell.

    Args:
        server: that is asked.
        requests: taken one by one; their keys differ, or they are one request.
        ledger: of the answers.
        read: turns an answer into the record that is kept, as JSON; raises `MalformedError` where
            it cannot: the answer is quarantined with the reason.
        manner: how.
        should_stop: asked before each request; what is under way then is waited for.
        progress: told after each outcome.

    Returns:
        What became of those that were sent.

    Raises:
        BudgetError: the next request could exceed the budget; it was not sent.
        RemoteError: the server denies every request, or one after the other came to nothing.
        InputError: the extra `api` is not installed.
    """
    return asyncio.run(_Run(ledger, read, manner, should_stop, progress).all(server, requests))


class _Run:
    """One call of `ask_all`."""

    def __init__(
        self,
        ledger: AnswerLedger,
        read: Read,
        manner: Manner,
        should_stop: Callable[[], bool],
        progress: Callable[[Tally], None],
    ) -> None:
        self._ledger = ledger
        self._read = read
        self._manner = manner
        self._should_stop = should_stop
        self._progress = progress
        self._budget = Budget(manner.limits, ledger.spent)
        self._tally = Tally()
        self._draw = random.Random()
        self._error: BaseException | None = None
        self._under_way: set[str] = set()
        self._settled = asyncio.Condition()
        self._quiet_until = 0.0
        self._in_vain = 0

    async def all(self, server: RemoteServer, requests: Iterable[Request]) -> Tally:
        left = (r for r in iter(requests) if self._ledger.outcome(r.key) is None)
        async with server.connected() as connection:
            workers = [self._work(connection, left) for _ in range(self._manner.concurrency)]
            # Nobody is cut off in the middle of an answer that has to be paid for.
            await asyncio.gather(*workers)
        if self._error is not None:
            raise self._error
        return self._tally

    @property
    def _stopped(self) -> bool:
        return self._error is not None or self._should_stop()

    async def _work(self, connection: Connection, requests: Iterator[Request]) -> None:
        try:
            while not self._stopped:
                request = next(requests, None)
                if request is None:
                    return
                if request.key in self._under_way or self._ledger.outcome(request.key):
                    continue
                self._under_way.add(request.key)
                try:
                    await self._until_answered(connection, request)
                finally:
                    self._under_way.discard(request.key)
        except Exception as error:
            self._error = self._error or error

    async def _until_answered(self, connection: Connection, request: Request) -> None:
        limits, backoff = self._manner.limits, self._manner.backoff
        most = limits.cost(request.prompt_tokens, request.new_tokens)
        reason = ''
        for attempt in range(1, backoff.attempts + 1):
            await self._quiet()
            if self._stopped:
                return
            if not await self._book(most):
                return
            reply = await self._attempt(connection, request, most)
            if reply.kind in ('answer', 'rejected', 'denied'):
                return
            reason = reply.text
            if attempt < backoff.attempts:
                if reply.wait:
                    # What one is told holds for all: they share the key.
                    now = asyncio.get_running_loop().time()
                    self._quiet_until = max(self._quiet_until, now + reply.wait)
                await self._sleep(backoff.seconds(attempt, reply.wait, self._draw))
        self._tally.given_up += 1
        self._came_to_nothing(f'no answer after {backoff.attempts} attempts; {reason}')

    async def _attempt(self, connection: Connection, request: Request, most: Cost) -> Reply:
        """Sends a request once, and settles what it cost."""
        cost = most
        try:
            self._ledger.asked(request.key, most)
            reply = await connection.send(request)
            if reply.kind == 'answer':
                cost = self._take(connection, request, reply.text, most)
            else:
                cost = most if reply.kind == 'lost' else Cost()
                self._end(request, reply, cost)
        finally:
            async with self._settled:
                self._budget.settle(most, cost)
                self._settled.notify_all()
        self._progress(self._tally)
        return reply

    def _take(self, connection: Connection, request: Request, text: str, most: Cost) -> Cost:
        """Reads an answer and keeps it, or why it is none; returns what it cost."""
        cost = most
        try:
            answer = _object(text)
            cost = self._cost(answer, most)
            record = self._read(request, answer)
        # What is paid for is kept whatever it is, and the server says what it likes.
        except Exception as error:
            known = isinstance(error, MalformedError)
            reason = str(error) if known else f'the answer has another form: {error!r}'
            kept = {'reason': reason, 'answer': connection.without_key(text[:KEPT_CHARACTERS])}
            self._ledger.ended(request.key, 'quarantined', cost, **kept)
            self._tally.quarantined += 1
            self._came_to_nothing(reason)
            return cost
        self._ledger.ended(request.key, 'answered', cost, record=record)
        self._tally.answered += 1
        self._in_vain = 0
        return cost

    def _end(self, request: Request, reply: Reply, cost: Cost) -> None:
        """Notes a request that was not answered."""
        if reply.kind == 'rejected':
            self._ledger.ended(request.key, 'quarantined', cost, reason=reply.text)
            self._tally.quarantined += 1
            self._came_to_nothing(reply.text)
            return
        outcome = 'lost' if reply.kind == 'lost' else 'refused'
        self._ledger.ended(request.key, outcome, cost, reason=reply.text)
        if reply.kind == 'denied':
            self._error = self._error or RemoteError(
                f'The server denies every request ({reply.text}). Check base_url, model and '
                'api_key_variable of config.teacher.remote, and the account; then run the same '
                'command again.'
            )

    def _cost(self, answer: dict[str, Any], most: Cost) -> Cost:
        """What the server says it charged; the most where it does not say."""
        usage = answer.get('usage')
        if not isinstance(usage, dict):
            return most
        prompt, new = usage.get('prompt_tokens'), usage.get('completion_tokens')
        if not (type(prompt) is int and type(new) is int and prompt >= 0 and new >= 0):
            return most
        return self._manner.limits.cost(prompt, new)

    def _came_to_nothing(self, reason: str) -> None:
        self._in_vain += 1
        if self._in_vain >= self._manner.patience:
            self._error = self._error or RemoteError(
                f'{self._in_vain} requests in a row came to nothing, and no more are sent; the '
                f'last: {reason}. Mend what is wrong, or check config.teacher.remote, and run the '
                'same command again: what is answered is kept.'
            )

    async def _book(self, most: Cost) -> bool:
        """Books, once it fits or nothing is under way that may turn out to cost less.

        Returns:
            False where all is to stop.
        """
        async with self._settled:
            await self._settled.wait_for(
                lambda: self._stopped or self._budget.fits(most) or self._budget.booked.tokens == 0
            )
            if self._stopped:
                return False
            self._budget.book(most)
            return True

    async def _quiet(self) -> None:
        """Waits as long as the server wants to be left alone, and not all until one moment."""
        now = asyncio.get_running_loop().time()
        if self._quiet_until > now:
            jitter = self._draw.uniform(0, self._manner.backoff.first)
            await self._sleep(self._quiet_until - now + jitter)

    async def _sleep(self, seconds: float) -> None:
        """Sleeps, but not past being asked to stop."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (left := end - loop.time()) > 0 and not self._stopped:
            await asyncio.sleep(min(left, 0.2))


def _object(text: str) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise MalformedError(f'the answer is no JSON: {error}') from error
    if not isinstance(answer, dict):
        raise MalformedError(f'the answer is no JSON object but {type(answer).__name__}')
    return answer
