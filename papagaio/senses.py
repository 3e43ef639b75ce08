"""Pictures and sounds as characters, and back: a code is one character of Unicode's private use areas, which no keyboard types.

    book = load_codebook(Path("out/digits/codebook.json"))
    text = encode(Path("three.png"), book)      # "\\U000f3a1c\\ue007\\ue0fe...": 17 characters for 8 x 8 pixels, each one a token
    decode(text, book, Path("again.png"))       # of a sound: a .wav

A picture is cut into square patches, the spectrogram of a sound into strips of a few frames. A codebook, learned by k-means,
lists K typical ones; the code of a patch or strip is the number of the nearest, as the character U+E000 + number. The numbers
rise with brightness or loudness. The character before the codes names the codebook: U+F0000 + a part of its sha256. (VQ-VAE,
van den Oord et al. 2017, learns codes in the same place; k-means needs no network.)

To a tokenizer with one token per character, to training, sampling and serving, all of this is text.
"""

import hashlib
import importlib.util
import io
import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from papagaio.errors import UserError
from papagaio.files import Manifest, read_manifest, read_object, sealed, to_json, whole, write_whole

FIRST_CODE, MOST_CODES = 0xE000, 6400  # U+E000 to U+F8FF
FIRST_OPENING, OPENINGS = 0xF0000, 65534  # U+F0000 to U+FFFFD
CODED = re.compile("(?P<opening>[\U000f0000-\U000ffffd]?)[\ue000-\uf8ff]+")  # a picture or a sound within a text
CODE = re.compile("[\U000f0000-\U000ffffd]|[\ue000-\uf8ff]")
CURE = "a codebook is written by data/digits.py or data/speech.py, beside their dataset"
SILENCE = -4.0  # log10 of the power of a band: what is quieter counts as silence
SHADES, BARS = " ░▒▓█", "▁▂▃▄▅▆▇█"
NARROW, WIDE = 16, 80  # columns of a terminal: narrower pictures are enlarged, wider ones lose pixels

Array = NDArray[np.float32]
Count = Annotated[int, Field(ge=1, le=2**20)]


class Codebook(Manifest):
    """What every codebook has: K vectors of D numbers, each as a line of text.

    The two kinds know how an array, which is a picture or a sound, becomes N vectors of D numbers and again an array.
    """

    of = "a codebook"
    media_type: ClassVar[str]  # of its files
    vectors: list[str]

    @abstractmethod
    def cut(self, array: Array) -> Array:
        """The vectors (N, D) of a picture or sound."""

    @abstractmethod
    def join(self, vectors: Array) -> Array:
        """The picture or sound of N vectors (N, D)."""

    @abstractmethod
    def drawn(self, vectors: Array, colour: bool) -> str:
        """How N vectors are shown in a terminal, with or without colours."""

    def remark(self, count: int) -> str:
        """What is wrong with so many codes; "" if nothing is."""
        return ""

    @abstractmethod
    def read(self, path: Path) -> Array:
        """The array of a file. Raises UserError if it is no picture or sound of the codebook's kind and size."""

    def file(self, text: str) -> bytes:
        """The content of a file of the first picture or sound in a text. Raises UserError as `found` does."""
        return self.packed(self.join(self.found(text)))

    @abstractmethod
    def packed(self, array: Array) -> bytes:
        """The content of a file of a picture or sound."""

    @cached_property
    def table(self) -> Array:
        """The vectors as numbers (K, D)."""
        return np.array([line.split() for line in self.vectors], np.float32)

    @cached_property
    def opening(self) -> str:
        """The character before the codes."""
        digest = hashlib.sha256(to_json(self.model_dump()).encode()).hexdigest()
        return chr(FIRST_OPENING + int(digest, 16) % OPENINGS)

    @property
    def characters(self) -> str:
        """Every character that a picture or sound can have."""
        return self.opening + "".join(chr(FIRST_CODE + i) for i in range(len(self.vectors)))

    def text(self, array: Array) -> str:
        """The characters of a picture or sound: for each of its vectors the code of the nearest one in the table."""
        vectors = self.cut(array)
        distances = (self.table**2).sum(1) - 2 * vectors @ self.table.T  # (N, K), without the squares of the vectors
        return self.opening + "".join(chr(FIRST_CODE + int(i)) for i in distances.argmin(1))

    def found(self, text: str) -> Array:
        """The vectors (N, D) of the first picture or sound in a text. Raises UserError if there is none of this codebook."""
        match = CODED.search(text)
        if match is None or not (codes := match[0].lstrip(match["opening"])):
            raise UserError(f"no codes of a picture or sound in {text[:40]!r}")
        if match["opening"] not in ("", self.opening):
            raise UserError("the codes are of another codebook; --codebook names the one of their dataset")
        numbers = [ord(code) - FIRST_CODE for code in codes]
        if max(numbers) >= len(self.vectors):
            raise UserError(f"code {max(numbers)} of another codebook: this one has {len(self.vectors)}")
        return self.table[numbers]


class PictureCodebook(Codebook):
    """Pictures of one size, as arrays (height, width, channels) of numbers from 0, black, to 1."""

    media_type = "image/png"
    kind: Literal["picture"] = "picture"
    height: Count
    width: Count
    channels: Literal[1, 3] = 1
    patch: Count  # pixels of its side

    @property
    def length(self) -> int:
        """Codes of a picture."""
        return self.height // self.patch * (self.width // self.patch)

    def cut(self, array: Array) -> Array:
        p = self.patch
        grid = array.reshape(self.height // p, p, self.width // p, p, self.channels)
        return grid.swapaxes(1, 2).reshape(self.length, p * p * self.channels)  # row by row

    def join(self, vectors: Array) -> Array:
        p = self.patch
        full = np.zeros((self.length, p * p * self.channels), np.float32)
        full[: len(vectors)] = vectors[: self.length]
        grid = full.reshape(self.height // p, self.width // p, p, p, self.channels)
        return grid.swapaxes(1, 2).reshape(self.height, self.width, self.channels).clip(0, 1)

    def remark(self, count: int) -> str:
        if count == self.length:
            return ""
        return f"{count} codes, and a picture has {self.length}: " + (
            "the rest is black" if count < self.length else "what follows them is left out"
        )

    def drawn(self, vectors: Array, colour: bool) -> str:
        """Two rows of pixels are a line of upper half-blocks; without colours a row is a line of shades."""
        pixels = self.join(vectors)
        repeat, skip = max(1, NARROW // self.width), max(1, -(-self.width // WIDE))
        pixels = pixels[::skip, ::skip].repeat(repeat, 0).repeat(repeat, 1).mean(2)
        if not colour:
            shades = (pixels[::2] * (len(SHADES) - 1)).round().astype(int)
            return "\n" + "".join("".join(SHADES[i] for i in row) + "\n" for row in shades)
        greys = 232 + (pixels * 23).round().astype(int)  # 232 to 255 are a terminal's greys, from black to white
        greys = np.pad(greys, ((0, len(greys) % 2), (0, 0)), constant_values=232)
        lines = (
            "".join(f"\x1b[38;5;{a};48;5;{b}m▀" for a, b in zip(*rows, strict=True))
            for rows in zip(greys[::2], greys[1::2], strict=True)
        )
        return "\n" + "".join(f"{line}\x1b[0m\n" for line in lines)

    def read(self, path: Path) -> Array:
        picture = open_picture(path, self.channels)
        if picture.shape[:2] != (self.height, self.width):
            size = f"{picture.shape[1]} x {picture.shape[0]} pixels"
            raise UserError(f"{path}: {size}; the codebook is of pictures of {self.width} x {self.height}: scale it first")
        return picture

    def packed(self, array: Array) -> bytes:
        from PIL import Image

        file = io.BytesIO()
        pixels = (array * 255).round().astype(np.uint8)
        Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels).save(file, "png")
        return file.getvalue()


class SoundCodebook(Codebook):
    """Sounds of one channel, as arrays (samples,) of numbers from -1 to 1. A strip is `frames` columns of the spectrogram."""

    media_type = "audio/wav"
    kind: Literal["sound"] = "sound"
    rate: Count  # samples per second
    window: Count  # samples of a frame
    hop: Count  # samples between the beginnings of two frames
    bands: Count  # of the mel scale, which divides frequencies as the ear does
    frames: Count  # of a code

    @cached_property
    def filters(self) -> Array:
        """How much each frequency counts in each band (bands, window / 2 + 1)."""
        import librosa

        return librosa.filters.mel(sr=self.rate, n_fft=self.window, n_mels=self.bands)

    def cut(self, array: Array) -> Array:
        import librosa

        power = self.filters @ np.abs(librosa.stft(array, n_fft=self.window, hop_length=self.hop)) ** 2  # (bands, columns)
        logs = np.log10(np.maximum(power, 10**SILENCE)).T
        logs = np.pad(logs, ((0, -len(logs) % self.frames), (0, 0)), constant_values=SILENCE)
        return logs.reshape(-1, self.frames * self.bands).astype(np.float32)

    def join(self, vectors: Array) -> Array:
        """Griffin and Lim (1984): phases that fit the magnitudes are found by iteration."""
        import librosa

        power = 10.0 ** vectors.reshape(-1, self.bands).T.astype(np.float64)
        magnitudes = np.sqrt(np.maximum(np.linalg.pinv(self.filters) @ power, 0))
        sound = librosa.griffinlim(magnitudes, hop_length=self.hop, random_state=0)
        return (sound / max(1.0, float(np.abs(sound).max()))).astype(np.float32)

    def drawn(self, vectors: Array, colour: bool) -> str:
        """A bar for each strip, as high as it is loud, and the duration."""
        loud = vectors.mean(1) - self.table.mean(1).min()
        bars = (loud / max(float(np.ptp(self.table.mean(1))), 1e-6) * (len(BARS) - 1)).round().astype(int)
        seconds = len(vectors) * self.frames * self.hop / self.rate
        return f"♪ {''.join(BARS[i] for i in bars)} {seconds:.1f} s"

    def read(self, path: Path) -> Array:
        import soundfile

        try:
            sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise UserError(f"{path}: no sound that can be read ({error.error_string}); a .wav file is needed") from None
        if rate != self.rate:
            raise UserError(f"{path}: {rate:,} samples a second, and {self.rate:,} are needed: resample it first")
        if sound.shape[1] != 1:
            raise UserError(f"{path}: {sound.shape[1]} channels, and one is needed: mix them first")
        if not sound.any():
            raise UserError(f"{path}: {'silence' if len(sound) else 'empty, without a sample'}")
        return sound[:, 0]

    def packed(self, array: Array) -> bytes:
        import soundfile

        file = io.BytesIO()
        soundfile.write(file, array, self.rate, format="WAV", subtype="PCM_16")
        return file.getvalue()


KINDS: dict[str, type[Codebook]] = {"picture": PictureCodebook, "sound": SoundCodebook}


def check_installed(*modules: str) -> None:
    """Raises UserError if one of them cannot be imported."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"not installed: {', '.join(missing)}; pip install 'papagaio[senses]', or pip install -r requirements.txt"
        )


def open_picture(path: Path, channels: int, size: int | None = None) -> Array:
    """A picture as an array (height, width, channels) of numbers from 0 to 1; with `size`, its middle, scaled to size x size.

    Raises UserError if the file holds none.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            picture = picture.convert("L" if channels == 1 else "RGB")
            found = np.asarray(ImageOps.fit(picture, (size, size)) if size else picture, np.float32) / 255
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = "no picture that can be read" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"{path}: {reason}; a picture such as .png is needed") from None
    return found.reshape(*found.shape[:2], channels)


def learn(book: Codebook, arrays: Sequence[Array], codes: int, seed: int) -> Codebook:
    """The codebook with `codes` vectors, the means of clusters of those of the arrays, in the order of their own means."""
    from sklearn.cluster import MiniBatchKMeans

    vectors = np.concatenate([book.cut(array) for array in arrays])
    codes = min(codes, MOST_CODES, len(np.unique(vectors, axis=0)))
    means = MiniBatchKMeans(codes, batch_size=4096, n_init=1, random_state=seed).fit(vectors).cluster_centers_
    means = means[means.mean(1).argsort()]
    return book.model_copy(update={"vectors": [" ".join(f"{number:.4g}" for number in mean) for mean in means]})


def save_codebook(book: Codebook, path: Path) -> None:
    write_whole(path, sealed(book.model_dump()))


def load_codebook(path: Path) -> Codebook:
    """The codebook in a file. Raises UserError if it is missing, damaged or of another shape."""
    shape = KINDS.get(str(read_object(path, CURE).get("kind")))
    if shape is None:
        raise UserError(f"{path}: not a codebook; {CURE}")
    return shape(**read_manifest(path, shape, CURE))


def encode(path: Path, book: Codebook) -> str:
    """The characters of a picture or sound in a file. Raises UserError if it does not fit the codebook."""
    return book.text(book.read(path))


def decode(text: str, book: Codebook, path: Path) -> None:
    """Write the first picture or sound in a text as a file. Raises UserError if it has none of this codebook."""
    write_file(path, book.file(text))


def write_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_bytes(content)
