"""Pictures as text: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, and any folder of pictures with captions.

    python data/digits.py --out out/digits
    python data/digits.py --out out/mine --folder my_pictures --size 32 --colour      captions in my_pictures/metadata.jsonl
    python data/digits.py --encode three.png --codebook out/digits/codebook.json      its codes, for a question
    python data/digits.py --decode drawn.jsonl --codebook out/digits/codebook.json --out sheet.png       the other way

The files are those of papagaio/corpus/captioned.py; what a code is, papagaio/senses.py says. Each training digit is there
--copies times, turned, sheared, stretched and moved a little. 360 digits are held out for the test, 180 for development.
"""

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import model_validator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.corpus.captioned import CodeOptions, Example, Wording, find_codebook, read_captions, read_codes, write_dataset
from papagaio.corpus.split import split_of
from papagaio.errors import UserError, located, run
from papagaio.options import option, parse
from papagaio.senses import Array, PictureCodebook, check_installed, learn, open_picture, write_file
from papagaio.terminal import progress

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
N_TEST, N_DEV = 360, 180  # pictures
WORDING = Wording("Which digit is this?\n{codes}", "Draw a {caption}.")
TYPICAL = 0.15  # strength of the changes of one in six, which may be drawn; the others are only named
LEARNED_FROM = 6000  # pictures from which the codebook is learned


class DigitsOptions(CodeOptions):
    """Options of data/digits.py."""

    folder: Path | None = option(None, "a folder of pictures with metadata.jsonl, instead of the digits")
    copies: int = option(80, "each training digit is there so many times, each time changed a little", ge=1)
    codes: int = option(128, "codes in the codebook", ge=2, le=6400)
    patch: int = option(2, "pixels of the side of a patch, which is one code", ge=1)
    size: int = option(32, "with --folder: pictures are cut to squares and scaled to so many pixels", ge=1, le=1024)
    colour: bool = option(False, "with --folder: red, green and blue instead of grey")

    @model_validator(mode="after")
    def _check_pictures(self) -> Self:
        if self.decode and self.out.suffix != ".png":
            raise ValueError(f"out {self.out}: the name of a .png file is needed")
        if self.folder and self.size % self.patch:
            raise ValueError(f"size {self.size} is not divisible by patch {self.patch}")
        if 8 % self.patch and not self.folder:
            raise ValueError(f"the digits have 8 x 8 pixels, which patch {self.patch} does not divide")
        return self


def main(config: DigitsOptions) -> None:
    check_installed("sklearn", "PIL")
    if config.encode:
        config.print_codes()
    elif config.decode:
        draw_sheet(read_codes(config.decode), find_codebook(config.codebook, config.decode), config.out)
    else:
        make(config, folder_pictures(config) if config.folder else digits(config))


def digits(config: DigitsOptions) -> list[tuple[Array, Example]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = (data.images / 16).astype(np.float32)[..., None]
    generator = np.random.default_rng(config.seed)
    order = generator.permutation(len(pictures))
    found = []
    for place, number in enumerate(order):
        split = "test" if place < N_TEST else "dev" if place < N_TEST + N_DEV else "train"
        example = Example("", NAMES[data.target[number]], split, f"digits/{number}")
        found.append((pictures[number], example))
        if split == "train":
            for copy in range(1, config.copies):
                typical = copy % 6 == 0
                picture = changed(pictures[number], TYPICAL if typical else 1, generator)
                found.append((picture, example._replace(typical=typical)))
    return found


def changed(picture: Array, strength: float, generator: np.random.Generator) -> Array:
    """The picture; with strength 1 turned by some 7 degrees, sheared and stretched by a tenth, and moved by half a pixel."""
    from scipy.ndimage import affine_transform

    angle, shear, *stretch = strength * generator.normal(0, (0.12, 0.1, 0.08, 0.08))
    stretch, move = np.exp(stretch), strength * generator.normal(0, 0.5, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1 / stretch[0], shear], [0, 1 / stretch[1]]])
    centre = (np.array(picture.shape[:2]) - 1) / 2
    return affine_transform(picture[..., 0], matrix, centre - matrix @ (centre + move), order=1).clip(0, 1)[..., None]


def folder_pictures(config: DigitsOptions) -> list[tuple[Array, Example]]:
    found = []
    for path, caption, place in read_captions(config.folder):
        with located(place):
            picture = open_picture(path, 3 if config.colour else 1, config.size)
        found.append((picture, Example("", caption, split_of(path.name, config.seed), path.name)))
    return found


def make(config: DigitsOptions, pictures: list[tuple[Array, Example]]) -> None:
    height, width, channels = pictures[0][0].shape
    book = PictureCodebook(height=height, width=width, channels=channels, patch=config.patch, vectors=[])
    training = [picture for picture, example in pictures if example.split == "train"]
    chosen = random.Random(config.seed).sample(training, min(len(training), LEARNED_FROM))
    book = learn(book, chosen, config.codes, config.seed)
    examples = [example._replace(codes=book.text(picture)) for picture, example in progress(pictures, "encoded")]
    wording = Wording() if config.folder else WORDING
    write_dataset(config.out, book, examples, wording, config.seed)


def draw_sheet(found: Sequence[tuple[str, str]], book: PictureCodebook, out: Path) -> None:
    """Write all pictures as one, in rows of ten, with a grey line of a pixel between them."""
    if not isinstance(book, PictureCodebook):
        raise UserError("the codebook is of sounds: data/speech.py decodes them")
    columns, edge = min(10, len(found)), 1
    tall, wide = book.height + edge, book.width + edge
    sheet = np.full((math.ceil(len(found) / columns) * tall + edge, columns * wide + edge, book.channels), 0.3, np.float32)
    for number, (place, text) in enumerate(found):
        with located(place):
            vectors = book.found(text)
        if remark := book.remark(len(vectors)):
            print(f"{place}: {remark}", file=sys.stderr)
        top, left = number // columns * tall + edge, number % columns * wide + edge
        sheet[top : top + book.height, left : left + book.width] = book.join(vectors)
    zoom = max(1, 512 // sheet.shape[1])
    write_file(out, book.packed(sheet.repeat(zoom, 0).repeat(zoom, 1)))
    print(f"{out}: {len(found):,} pictures", file=sys.stderr)


if __name__ == "__main__":
    run(main, parse(DigitsOptions, doc=__doc__))
