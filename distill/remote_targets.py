"""Rows of text as requests for their log-probabilities, and the answers as targets of those rows.

A row holds pieces of documents, one behind the other. Each is sent by itself, as ids, so that the
teacher sees of it what an online teacher would see; the id that its last position predicts, which
may stand in another row, is sent behind it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from distill.asking import MalformedError
from distill.remote import Request
from distill.token_names import TokenNames
from distill.token_scores import TopRows, echoed, nothing_said, prompt_log_probs, top_rows
from distill.types import Batch, TopKTargets

Scoring = Literal['echo', 'prompt_logprobs']


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one document in one row.

    Attributes:
        row: of the batch.
        start: its first position.
        ids: its tokens and, where its last position counts, the label of that.
    """

    row: int
    start: int
    ids: tuple[int, ...]

    @property
    def predicted(self) -> int:
        """Positions that a target is there for: those whose next token is known."""
        return len(self.ids) - 1


def pieces_of(batch: Batch, rows: Sequence[int]) -> Iterator[Piece]:
    """Cuts rows into pieces; those that predict nothing are left out.

    Args:
        batch: on the host.
        rows: of the batch.
    """
    for row in rows:
        segments, tokens = np.asarray(batch.segment_ids[row]), np.asarray(batch.tokens[row])
        bounds = [0, *(np.flatnonzero(np.diff(segments)) + 1), len(segments)]
        for start, stop in itertools.pairwise(bounds):
            counts = bool(batch.mask[row, stop - 1])
            last = [int(batch.labels[row, stop - 1])] if counts else []
            ids = (*tokens[start:stop].tolist(), *last)
            if segments[start] and len(ids) > 1:
                yield Piece(row, int(start), ids)


def score_request(ids: Sequence[int], scoring: Scoring, k: int, *, as_ids: bool) -> Request:
    """Returns the request for the `k` likeliest ids at each token of a text but the first.

    Args:
        ids: of the text.
        scoring: 'echo' as OpenAI's completions have it, or vLLM's 'prompt_logprobs', which writes
            one token more.
        k: ids.
        as_ids: whether echoed tokens are to be named by their ids.
    """
    body: dict[str, Any] = {'prompt': list(ids), 'temperature': 1.0}
    if scoring == 'echo':
        names = {'return_tokens_as_token_ids': True} if as_ids else {}
        body |= {'max_tokens': 0, 'echo': True, 'logprobs': k} | names
        return Request('completions', body, len(ids), 0)
    return Request('completions', body | {'max_tokens': 1, 'prompt_logprobs': k}, len(ids), 1)


def score_reader(scoring: Scoring, k: int, names: TokenNames) -> Callable[[Request, Any], Any]:
    """Returns the function that reads answers to `score_request`, for `distill.asking.ask_all`."""

    def read(request: Request, answer: dict[str, Any]) -> Any:
        choices = answer.get('choices')
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise MalformedError('the answer does not hold one choice')
        sent = request.body['prompt']
        if scoring == 'echo':
            entries = echoed(choices[0], sent, names)
        else:
            entries = prompt_log_probs(choices[0], sent)
        return top_rows(entries, k, len(names.table)).packed()

    return read


def assemble(batch: Batch, k: int, said: Callable[[Piece], TopRows | None]) -> TopKTargets:
    """Puts what the teacher said of pieces where they stand.

    Args:
        batch: on the host.
        k: ids of each token.
        said: gives the rows of a piece, one for each predicted position; None where there are none.

    Returns:
        Targets of the whole batch. Where nothing was said, and in padding, all mass is in the tail,
        which teaches nothing.
    """
    shape = np.shape(batch.tokens)
    flat = nothing_said(shape[0] * shape[1], k)
    for piece in pieces_of(batch, range(shape[0])):
        rows = said(piece)
        if rows is not None:
            first = piece.row * shape[1] + piece.start
            place = slice(first, first + piece.predicted)
            flat.ids[place], flat.log_probs[place] = rows.ids, rows.log_probs
            flat.tail_log_probs[place] = rows.tail_log_probs
    fields: Any = (
        flat.ids.reshape(*shape, k),
        flat.log_probs.reshape(*shape, k),
        flat.tail_log_probs.reshape(shape),
    )
    return TopKTargets(*fields)


def silent_positions(batch: Batch, targets: TopKTargets) -> int:
    """Counts the positions that are trained on and of which nothing was said."""
    said = (np.asarray(targets.log_probs) > -np.inf).any(-1)
    return int((np.asarray(batch.mask) & ~said).sum())
