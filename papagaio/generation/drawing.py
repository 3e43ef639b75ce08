"""Codes in a terminal: pictures as half-blocks, sounds as bars. Files and pipes get the codes themselves.

drawing = Drawing(Path("out/digits/chat"), colour=True)
drawing.push("It is ")       -> "It is "
drawing.push("\U000f3a1c")   -> "", and so on until the picture is complete: then its lines
drawing.close()              -> what is left at the end
"""

import re
from functools import cached_property
from pathlib import Path

from papagaio.errors import UserError
from papagaio.senses import CODE, CODED, FIRST_OPENING, Codebook, PictureCodebook, load_codebook


def codebooks_near(checkpoint: Path) -> list[Codebook]:
    """The codebooks in the directory of a checkpoint or in the nearest above it, up to the dataset's (out/digits/run/checkpoints/
    step-600 -> out/digits). Raises UserError if one is damaged."""
    here = checkpoint.resolve()
    found = (sorted(folder.glob("codebook*.json")) for folder in [here, *here.parents][:4])
    return [load_codebook(path) for path in next(filter(None, found), [])]


class Drawing:
    """Shows text that arrives in pieces: a picture or sound appears when it is complete. Other text passes as it is.

    `checkpoint` is where codebooks are sought when the first code comes; None: nothing is drawn.
    """

    def __init__(self, checkpoint: Path | None, colour: bool) -> None:
        self.checkpoint, self.colour, self.held = checkpoint, colour, ""

    @cached_property
    def books(self) -> list[Codebook]:
        return codebooks_near(self.checkpoint) if self.checkpoint else []

    def push(self, text: str) -> str:
        """What can be shown now. Codes are held back until something else follows them or their picture is complete."""
        if not self.checkpoint:
            return text
        text, self.held = self.held + text, ""
        last = list(CODED.finditer(text))[-1:]
        end = len(text)
        if last and last[0].end() == end:
            end = end if self.is_complete(last[0]) else last[0].start()
        elif text[-1:] >= chr(FIRST_OPENING):
            end -= 1
        self.held = text[end:]
        return CODED.sub(self.draw, text[:end])

    def close(self) -> str:
        """The rest, when no more text comes."""
        text, self.held = self.held, ""
        return CODED.sub(self.draw, text)

    def marked(self, text: str) -> str:
        """The text with a square for each code, which then has the colour of its token."""
        return CODE.sub("■", text) if self.checkpoint and CODE.search(text) and self.books else text

    def book(self, match: re.Match[str]) -> Codebook | None:
        return next((book for book in self.books if match["opening"] in ("", book.opening)), None)

    def is_complete(self, match: re.Match[str]) -> bool:
        book = self.book(match)
        return isinstance(book, PictureCodebook) and len(match[0]) - len(match["opening"]) >= book.length

    def draw(self, match: re.Match[str]) -> str:
        book, count = self.book(match), len(match[0]) - len(match["opening"])
        if book is None:  # without an opening, a character of another use
            return f"[{count} codes: their codebook.json is not beside the model]" if match["opening"] else match[0]
        try:
            remark = book.remark(count)
            return book.drawn(book.found(match[0]), self.colour) + (f"({remark})\n" if remark else "")
        except UserError as error:
            return f"[{count} codes: {error}]"
