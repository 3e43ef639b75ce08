"""Tokens to text while they are generated.

    stream = TextStream(tokenizer, stop=["\\n\\n"])
    stream.push(token)                           # the text that can be shown now; "" after half a character
    stream.close()                               # the rest

A token can end anywhere, even inside a character.
"""

import codecs
import unicodedata
from collections.abc import Sequence

from papagaio.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text of whole characters with their combining marks, which ends before the first of the `stop` texts.

    Held back until more tokens come: the beginning of a UTF-8 character or of a stop text, and the last character, because a
    combining mark may follow.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped, self.held = tokenizer, [text for text in stop if text], False, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int, may_stop: bool = True) -> str:
        """Add a token; returns the text that cannot change any more. `stopped` becomes true when a stop text is complete."""
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        stop = self.stop if may_stop else []
        cuts = [self.held.find(text) for text in stop if text in self.held]
        if cuts:
            self.stopped = True
            return self._take(min(cuts), drop=True)
        safe = len(self.held) - max((_overlap(self.held, text) for text in self.stop), default=0)
        if safe and safe == len(self.held) and unicodedata.category(self.held[-1]) != "Cc":
            safe -= 1
        while 0 < safe < len(self.held) and _joins(self.held[safe - 1], self.held[safe]):
            safe -= 1
        return self._take(safe)

    def close(self) -> str:
        """The text that was held back, when no more tokens come."""
        if not self.stopped:
            self.held += self.decoder.decode(b"", final=True)
        return self._take(len(self.held))

    def _take(self, count: int, drop: bool = False) -> str:
        text, self.held = self.held[:count], "" if drop else self.held[count:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of text that is a prefix of stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _joins(before: str, character: str) -> bool:
    """Whether a character is displayed as one with the character before: a combining mark, part of an emoji, half a flag."""
    flags = "\U0001f1e6" <= before <= "\U0001f1ff" and "\U0001f1e6" <= character <= "\U0001f1ff"
    joiner = "\u200d"
    tone = "\U0001f3fb" <= character <= "\U0001f3ff"
    return unicodedata.category(character).startswith("M") or joiner in (before, character) or tone or flags
