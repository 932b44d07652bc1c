"""Which id of a tokenizer a server means when it names a token by text, by bytes or by number."""

import re
from collections.abc import Sequence

from distill.token_bytes import special_tokens, token_bytes
from distill.tokenizer import Tokenizer

_NUMBER = re.compile(r'token_id:(\d+)')
_BROKEN = '\ufffd'
_BYTES, _ESCAPE = 'bytes:', re.compile(rb'\\x([0-9a-fA-F]{2})')


class TokenNames:
    """The names of a tokenizer's ids.

    Args:
        tokenizer: of the teacher, and so of the student.

    Attributes:
        table: bytes of each id; those of special tokens are none.

    Raises:
        InputError: where the tokenizer does not tell the bytes of its tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.table = token_bytes(tokenizer)
        self._special = special_tokens(tokenizer)
        self._ids: dict[bytes, int] = {}
        for index, entry in reversed(list(enumerate(self.table))):
            if entry:
                self._ids[entry] = index

    def id_of(self, name: str, spelt: Sequence[int] | None = None) -> int | None:
        """Finds the id that a name means; the lowest, of several with the same bytes.

        Args:
            name: 'token_id:7', a special token as the tokenizer spells it, 'bytes:' and escapes, or
                the text of the token.
            spelt: the token's bytes, where the server gives them.

        Returns:
            None where no id has this name, or where the name is a piece of a character, which
            several ids share.
        """
        number = _NUMBER.fullmatch(name)
        if number is not None:
            index = int(number[1])
            return index if index < len(self.table) else None
        if name in self._special:
            return self._special[name]
        content = bytes(spelt) if spelt else self._content(name)
        return None if content is None else self._ids.get(content)

    def may_mean(self, name: str, index: int) -> bool:
        """Whether a server that means this id could call it so.

        Names of pieces of characters are the same for many ids; special tokens have any name.
        """
        number = _NUMBER.fullmatch(name)
        if number is not None:
            return int(number[1]) == index
        entry = self.table[index]
        if not entry:
            return name not in self._special or self._special[name] == index
        if self._content(name) == entry:
            return True
        return _BROKEN in name and entry.decode(errors='replace') == name

    @staticmethod
    def _content(name: str) -> bytes | None:
        if name.startswith(_BYTES) and _ESCAPE.search(name.encode()):
            raw = name[len(_BYTES) :].encode()
            return _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), raw)
        return None if _BROKEN in name else name.encode()
