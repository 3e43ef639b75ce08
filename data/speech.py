"""Spoken numbers as text: zero to ninety-nine in English and Portuguese, spoken by espeak-ng, and any folder of sounds.

    python data/speech.py --out out/speech                                 the numbers, in many voices, pitches and speeds
    python data/speech.py --out out/mine --folder my_sounds                .wav files, captions in my_sounds/metadata.jsonl
    python data/speech.py --encode a.wav --codebook out/speech/codebook.json                     its codes, for a question
    python data/speech.py --decode spoken.jsonl --codebook out/speech/codebook.json --out wavs   the other way, and spectrograms

The files are those of papagaio/corpus/captioned.py; what a code is, papagaio/senses.py says. Some of espeak-ng's voices are
only in the dev questions, others only in the test questions.
"""

import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.corpus.captioned import CodeOptions, Example, Wording, find_codebook, read_captions, read_codes, write_dataset
from papagaio.corpus.split import split_of
from papagaio.errors import MachineError, UserError, located, run
from papagaio.files import whole
from papagaio.options import option, parse
from papagaio.senses import Array, Codebook, SoundCodebook, check_installed, decode, learn
from papagaio.terminal import progress

# espeak-ng's variants of a voice (espeak-ng-data/voices/!v). Those that only whisper or hiss are left out.
DEV_VOICES = ("f4", "m5", "Lee", "steph")
TEST_VOICES = ("f5", "m7", "Andrea", "Mike", "quincy", "linda", "paul", "anika")
TRAIN_VOICES = (
    *(
        "f1",
        "f2",
        "f3",
        "m1",
        "m2",
        "m3",
        "m4",
        "m6",
        "m8",
        "Alex",
        "Alicia",
        "Andy",
        "Annie",
        "Denis",
        "Diogo",
        "Gene",
        "Henrique",
    ),
    *(
        "Hugo",
        "Jacky",
        "Marco",
        "Mario",
        "Michael",
        "Nguyen",
        "adam",
        "antonio",
        "aunty",
        "belinda",
        "benjamin",
        "boris",
        "caleb",
    ),
    *("david", "ed", "edward", "grandma", "grandpa", "gustave", "iven", "john", "marcelo", "max", "michel", "miguel", "pablo"),
    *("pedro", "rob", "robert", "sandro", "shelby", "travis", "victor", "zac"),
)
LANGUAGES = {"en": ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029"), "pt": ("pt-br", "pt")}
UNITS = {
    "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
    "pt": "zero um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze dezesseis dezessete dezoito "
    "dezenove",
}
TENS = {
    "en": "twenty thirty forty fifty sixty seventy eighty ninety",
    "pt": "vinte trinta quarenta cinquenta sessenta setenta oitenta noventa",
}
RATE = 22050  # samples per second of espeak-ng
TOP_DB = 40  # what is this much quieter than the loudest, at both ends, is cut off
WORDING = Wording("What was said?\n{codes}", "Say {caption}.")


class SpeechOptions(CodeOptions):
    """Options of data/speech.py."""

    folder: Path | None = option(None, "a folder of .wav files with metadata.jsonl, instead of espeak-ng's numbers")
    copies: int = option(35, "times that each number is spoken for training, in each language", ge=1)
    versions: int = option(4, "encodings of each spoken number: the first as it is, the others a little faster or slower", ge=1)
    codes: int = option(512, "codes in the codebook", ge=2, le=6400)
    rate: int = option(RATE, "with --folder: samples per second of its files", ge=1000)


class Utterance(NamedTuple):
    text: str
    voice: str
    pitch: int  # of espeak-ng: 0 to 99
    speed: int  # words per minute

    def speak(self) -> Array:
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            command = ["espeak-ng", "-v", self.voice, "-p", str(self.pitch), "-s", str(self.speed), "-w", file.name, self.text]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise MachineError(f"espeak-ng failed: {' '.join(command)}: {done.stderr.strip()}")
            return trimmed(SoundCodebook.model_construct(rate=RATE).read(Path(file.name)))


def trimmed(sound: Array) -> Array:
    """Without the silence at both ends."""
    import librosa

    return librosa.effects.trim(sound, top_db=TOP_DB)[0]


def spelled(number: int, language: str) -> str:
    """42 -> forty-two, quarenta e dois."""
    units, tens = UNITS[language].split(), TENS[language].split()
    if number < 20:
        return units[number]
    ten, unit = tens[number // 10 - 2], number % 10
    return ten + ({"en": "-", "pt": " e "}[language] + units[unit] if unit else "")


def utterances(variants: tuple[str, ...], copies: int, generator: random.Random) -> Iterator[Utterance]:
    for language, voices in LANGUAGES.items():
        for number in range(100):
            for _ in range(copies):
                voice = f"{generator.choice(voices)}+{generator.choice(variants)}"
                yield Utterance(spelled(number, language), voice, generator.randint(20, 80), generator.randint(130, 210))


def main(config: SpeechOptions) -> None:
    check_installed("sklearn", "librosa", "soundfile")
    if config.encode:
        config.print_codes()
    elif config.decode:
        decode_all(read_codes(config.decode), find_codebook(config.codebook, config.decode), config.out)
    elif config.folder:
        make(config, folder_sounds(config))
    else:
        make(config, spoken_numbers(config))


def check_voices() -> None:
    """Raises UserError if espeak-ng or a voice is missing: in place of an unknown one espeak-ng takes another, in silence."""
    if not shutil.which("espeak-ng"):
        raise UserError("espeak-ng is not installed: apt-get install espeak-ng; --folder takes sounds of your own")
    listed = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True).stdout
    if missing := {*TRAIN_VOICES, *DEV_VOICES, *TEST_VOICES} - set(re.findall(r"!v/(\S+)", listed)):
        raise UserError(f"espeak-ng lacks the voices {', '.join(sorted(missing))}: version 1.51 has them")


def spoken_numbers(config: SpeechOptions) -> list[tuple[Array, Example]]:
    check_voices()
    generator = random.Random(config.seed)
    plan = [("train", each) for each in utterances(TRAIN_VOICES, config.copies, generator)]
    plan += [("dev", each) for each in utterances(DEV_VOICES, 2, generator)]
    plan += [("test", each) for each in utterances(TEST_VOICES, 2, generator)]
    with ThreadPoolExecutor() as pool:
        sounds = list(progress(pool.map(lambda pair: pair[1].speak(), plan), "spoken"))
    found = []
    noise = np.random.default_rng(config.seed)
    for sound, (split, each) in zip(sounds, plan, strict=True):
        example = Example("", each.text, split, f"{each.voice} pitch {each.pitch} speed {each.speed}")
        found.append((sound, example))
        if split == "train":
            found += [(resampled(sound, noise), example) for _ in range(config.versions - 1)]
    return found


def resampled(sound: Array, generator: np.random.Generator) -> Array:
    """The sound of a tape that runs up to 14 % faster or slower, as of another voice, after a pause of up to 20 ms.

    Ko et al. (2015), "Audio augmentation for speech recognition", call it speed perturbation.
    """
    factor, pause = np.exp(generator.uniform(-0.13, 0.13)), np.zeros(generator.integers(RATE // 50), np.float32)
    places = np.arange(0, len(sound) - 1, factor)
    return np.concatenate([pause, np.interp(places, np.arange(len(sound)), sound).astype(np.float32)])


def folder_sounds(config: SpeechOptions) -> list[tuple[Array, Example]]:
    reader = SoundCodebook.model_construct(rate=config.rate)
    found = []
    for path, caption, place in read_captions(config.folder):
        with located(place):
            found.append((trimmed(reader.read(path)), Example("", caption, split_of(path.name, config.seed), path.name)))
    return found


def make(config: SpeechOptions, sounds: list[tuple[Array, Example]]) -> None:
    rate = config.rate if config.folder else RATE
    hop = 2 ** round(np.log2(rate * 0.012))  # 12 ms, a quarter of a window
    book: Codebook = SoundCodebook(rate=rate, window=4 * hop, hop=hop, bands=40, frames=2, vectors=[])
    training = [sound for sound, example in sounds if example.split == "train"]
    book = learn(book, random.Random(config.seed).sample(training, min(len(training), 3000)), config.codes, config.seed)
    examples = [example._replace(codes=book.text(sound)) for sound, example in progress(sounds, "encoded")]
    write_dataset(config.out, book, examples, WORDING, config.seed)


def decode_all(found: list[tuple[str, str]], book: Codebook, out: Path) -> None:
    if not isinstance(book, SoundCodebook):
        raise UserError("the codebook is of pictures: data/digits.py decodes them")
    if out.exists():
        raise UserError(f"{out}: is there already; name a new directory")
    from matplotlib import image

    with whole(out) as temporary:
        temporary.mkdir()
        for number, (place, text) in enumerate(found, 1):
            with located(place):
                decode(text, book, temporary / f"{number:03}.wav")
            columns = book.cut(book.read(temporary / f"{number:03}.wav")).reshape(-1, book.bands).T
            image.imsave(temporary / f"{number:03}.png", columns, origin="lower", cmap="magma")
    print(f"{out}: {len(found):,} sounds, and their spectrograms", file=sys.stderr)


if __name__ == "__main__":
    run(main, parse(SpeechOptions, doc=__doc__))
