"""Tokens to text while they come.

    stream = TextStream(tokenizer, stop=["\\n\\n"])
    stream.push(token)                           # the text that is certain now, "" for half a character
    stream.close()                               # the rest

Tokens end anywhere, inside a character as well.
"""

import codecs
import unicodedata
from collections.abc import Sequence

from papagaio.tokenizer import Tokenizer


class TextStream:
    """Text of tokens as they come: whole characters with all their marks, ending before the first of the `stop` texts.

    Held back until more is known: the beginning of a UTF-8 character or of a stop text, and the last character, to which a
    combining mark may still come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped, self.held = tokenizer, [text for text in stop if text], False, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int, may_stop: bool = True) -> str:
        """The text that is certain with this token. `stopped` is true once a stop text is complete."""
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
        """What was held back, when no more tokens come."""
        if not self.stopped:
            self.held += self.decoder.decode(b"", final=True)
        return self._take(len(self.held))

    def _take(self, count: int, drop: bool = False) -> str:
        text, self.held = self.held[:count], "" if drop else self.held[count:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _joins(before: str, character: str) -> bool:
    """Whether a character is shown in one with the one before it: a combining mark, a part of an emoji, half a flag."""
    flags = "\U0001f1e6" <= before <= "\U0001f1ff" and "\U0001f1e6" <= character <= "\U0001f1ff"
    joiner = "\u200d"
    tone = "\U0001f3fb" <= character <= "\U0001f3ff"
    return unicodedata.category(character).startswith("M") or joiner in (before, character) or tone or flags
