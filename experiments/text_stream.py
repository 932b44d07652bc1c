"""Tokens into text as they come, up to the first of some strings."""

from collections.abc import Sequence

from distill.tokenizer import Tokenizer

BROKEN = '\N{REPLACEMENT CHARACTER}'


class TextStream:
    """The text of one answer.

    What may still change is held back: the bytes of a character that is not complete, and what may
    be the start of a stop string.

    Args:
        tokenizer: of the model.
        stops: strings that end the text, and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._given = 0
        self.stopped = False

    def feed(self, token: int, *, last: bool = False) -> str:
        """Adds a token, and returns the text that is certain by now and was not given yet."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, text = True, text[: min(ends)]
        elif not last:
            text = text[: self._certain(text)]
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new

    def _certain(self, text: str) -> int:
        """Returns how much of a text no further token can change or end earlier."""
        whole = len(text.rstrip(BROKEN))
        for stop in self._stops:
            for size in range(min(len(stop) - 1, whole), 0, -1):
                if text[:whole].endswith(stop[:size]):
                    whole -= size
                    break
        return whole
