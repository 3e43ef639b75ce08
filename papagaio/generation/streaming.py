"""Tokens to text while they are generated.

    stream = TextStream(tokenizer, stop=["\\n\\n"])
    stream.push(token)                           # the text that can be shown now; "" after half a character
    stream.close()                               # the rest

A token can end anywhere, even inside a character.
"""

import codecs
from collections.abc import Sequence

import regex

from papagaio.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text of whole characters with their combining marks, which ends before the first of the `stop` texts.

    Held back until more tokens come: the beginning of a UTF-8 character or of a stop text, and the last character, because a
    combining mark may follow.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped, self.held = tokenizer, [text for text in stop if text], False, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Add a token; returns the text that cannot change any more. `stopped` becomes true when a stop text is complete."""
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        if cuts := [self.held.find(text) for text in self.stop if text in self.held]:
            self.stopped, text, self.held = True, self.held[: min(cuts)], ""
            return text
        stop_begins = (n for text in self.stop for n in range(len(text)) if self.held.endswith(text[:n]))
        safe = len(self.held) - max(stop_begins, default=0)
        # Where a displayed character (\X) begins, and the end after a control character, to which no mark can be added.
        begins = (match.start() for match in regex.finditer(r"(?<=\p{Cc})\Z|\X", self.held))
        safe = max((begin for begin in begins if begin <= safe), default=0)
        text, self.held = self.held[:safe], self.held[safe:]
        return text

    def close(self) -> str:
        """The text that was held back, when no more tokens come."""
        text, self.held = self.held, ""
        return text if self.stopped else text + self.decoder.decode(b"", final=True)
