"""What a teacher said while it wrote, as targets of the text it wrote, by byte offsets."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from distill.asking import MalformedError
from distill.token_scores import TopRows, nothing_said


def bytes_before(tokens: Sequence[bytes], text: str) -> int:
    """Finds where in the bytes of the tokens a text begins.

    A server may take spaces off the beginning of a text and whatever stopped it off its end, and
    list the tokens of both.

    Args:
        tokens: as the server lists them.
        text: as the server gives it.

    Raises:
        MalformedError: the tokens are not those of the text; names the first byte that differs.
    """
    listed, given = b''.join(tokens), text.encode()
    spaces = len(listed) - len(listed.lstrip(b' '))
    before = next((at for at in range(spaces + 1) if listed[at:].startswith(given)), None)
    if before is not None:
        return before
    same = next(
        (at for at, pair in enumerate(zip(listed, given, strict=False)) if pair[0] != pair[1]),
        min(len(listed), len(given)),
    )
    raise MalformedError(
        f'misaligned at byte {same}: the tokens spell {listed[same : same + 16]!r} where the text '
        f'has {given[same : same + 16]!r}'
    )


def written_rows(
    document: Int[np.ndarray, 'n'],
    table: Sequence[bytes],
    start: int,
    lengths: Sequence[int],
    said: TopRows,
) -> TopRows:
    """Gives each token of a document what the teacher said before it wrote that same token.

    A token is the same where it holds the same bytes of the text. Where the two sides cut the text
    differently, as they may where the prompt ends, and in the prompt, nothing was said.

    Args:
        document: ids: `bos`, the text, `eos`.
        table: bytes of each id.
        start: the byte of the text that the teacher's first token begins at.
        lengths: bytes of each of the teacher's tokens.
        said: of each of them.

    Returns:
        Rows of the positions of the document: row `i` is about token `i + 1`.
    """
    k = said.ids.shape[1]
    rows = nothing_said(len(document), k)
    own = {span: place for place, span in enumerate(_spans([len(table[i]) for i in document], 0))}
    for place, span in enumerate(_spans(lengths, start)):
        position = own.get(span, 0) - 1
        if span[0] < span[1] and position >= 0:
            rows.ids[position] = said.ids[place]
            rows.log_probs[position] = said.log_probs[place]
            rows.tail_log_probs[position] = said.tail_log_probs[place]
    return rows


def _spans(lengths: Sequence[int], start: int) -> list[tuple[int, int]]:
    ends = start + np.cumsum(lengths)
    return [(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]
