"""An engine on a thread of its own, which takes requests from others and answers as it writes."""

import collections
import dataclasses
import threading
from collections.abc import Callable

from absl import logging

from moe.engine import Engine
from moe.requests import CacheUse, Event, QueueFullError, Request, check_request

# Called on the engine's thread; None says that the engine has failed.
Sink = Callable[[Event | None], None]


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request under way."""

    request: Request
    sink: Sink
    number: int | None = None
    cancelled: bool = False


@dataclasses.dataclass
class Counters:
    """What has been done since the start."""

    requests: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    cancelled: int = 0
    rejected: int = 0


class Worker:
    """Runs an engine while there is something to write.

    Args:
        engine: that no one else touches from now on.
        vocab_size: of what may be asked.
    """

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self.config = engine.config
        self.counters = Counters()
        self.cache_use = CacheUse()
        self.healthy = True
        self._engine = engine
        self._vocab_size = vocab_size
        self._changed = threading.Condition()
        self._new: collections.deque[Ticket] = collections.deque()
        self._cancelled: collections.deque[Ticket] = collections.deque()
        self._tickets: dict[int, Ticket] = {}
        self._under_way = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
        self._thread.start()

    @property
    def under_way(self) -> int:
        """Requests that wait, are read or are written."""
        return self._under_way

    def submit(self, requests: list[Request], sinks: list[Sink]) -> list[Ticket]:
        """Takes all of some requests, or none of them.

        Raises:
            InputError: where one of them can never be written.
            QueueFullError: where there are too many.
        """
        for request in requests:
            check_request(request, self.config, self._vocab_size)
        tickets = [Ticket(*pair) for pair in zip(requests, sinks, strict=True)]
        with self._changed:
            most = self.config.max_rows + self.config.max_waiting
            if self._under_way + len(tickets) > most:
                self.counters.rejected += 1
                raise QueueFullError(
                    f'{self._under_way} requests are under way and {len(tickets)} were asked for; '
                    f'at most {most} may be. Try again later, or ask for fewer at once.'
                )
            self._under_way += len(tickets)
            self.counters.requests += len(tickets)
            self.counters.prompt_tokens += sum(len(request.prompt) for request in requests)
            self._new.extend(tickets)
            self._changed.notify()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Frees what a request holds, before the next token; one that is done stays so."""
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after the token that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take():
                events = self._engine.step()
                self.cache_use = self._engine.cache_use
                for event in events:
                    self._answer(event)
        except Exception:
            logging.exception('The engine has failed; requests are refused from now on.')
            self.healthy = False
            with self._changed:
                tickets = [*self._new, *self._tickets.values()]
                self._under_way = 0
            for ticket in tickets:
                ticket.sink(None)

    def _take(self) -> bool:
        """Takes what is new, waiting where there is nothing to do; False at the end."""
        with self._changed:
            while not (self._new or self._cancelled or self._closed) and self._engine.idle:
                self._changed.wait()
            # Those that were cancelled before they were taken never come to the engine.
            for ticket in self._cancelled:
                self._drop(ticket)
            self._cancelled.clear()
            while self._new and self._engine.waiting < max(1, self.config.max_waiting):
                ticket = self._new.popleft()
                if not ticket.cancelled:
                    ticket.number = self._engine.submit(ticket.request)
                    self._tickets[ticket.number] = ticket
            return not self._closed

    def _drop(self, ticket: Ticket) -> None:
        waits = ticket.number is None and not ticket.cancelled and ticket in self._new
        if waits or (ticket.number is not None and self._tickets.pop(ticket.number, None)):
            ticket.cancelled = True
            self._under_way -= 1
            self.counters.cancelled += 1
        if ticket.number is not None:
            self._engine.cancel(ticket.number)

    def _answer(self, event: Event) -> None:
        ticket = self._tickets.get(event.request)
        if ticket is None:
            return
        with self._changed:
            self.counters.tokens += event.token is not None
            if event.finish is not None:
                del self._tickets[event.request]
                self._under_way -= 1
        ticket.sink(event)
