"""Tiny Shakespeare, 1,115,394 bytes of plays in one text file: downloaded, or taken from a copy, and checked either way.

    python data/shakespeare.py --out out/shakespeare                       -> out/shakespeare/input.txt
    python data/shakespeare.py --out out/shakespeare --from my_copy.txt    the same without a network

input.txt appears only when its sha256 is the one below: what trained on it can be compared with what others report.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.errors import MachineError, UserError, run
from papagaio.options import Options, option, parse

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class ShakespeareOptions(Options):
    """Options of data/shakespeare.py."""

    out: Path = option(..., "directory for input.txt")
    from_: Path | None = option(None, "a copy of the file, taken instead of the download")
    url: str = option(URL, "where to download from", pattern=r"^https?://")


def main(config: ShakespeareOptions) -> None:
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out={config.out}: a file; a directory is needed")
    if config.from_:
        take(config.from_, config.out)
    else:
        download(config.url, config.out)


def take(copy: Path, out: Path) -> None:
    try:
        text = copy.read_bytes()
    except OSError as error:
        raise UserError(f"--from={copy}: {error.strerror}; a copy of {URL} is needed") from None
    if (found := hashlib.sha256(text).hexdigest()) != SHA256:
        raise UserError(f"--from={copy}: another text: its sha256 is {found}, Tiny Shakespeare's is {SHA256}")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:  # written aside and renamed: never half a file
        (Path(folder) / "input.txt").write_bytes(text)
        (Path(folder) / "input.txt").replace(out / "input.txt")


def download(url: str, out: Path) -> None:
    import pooch
    import requests

    # pooch writes aside, too, and renames when the sum is right; it waits 1 s before the second attempt, 2 s before the third.
    storage = pooch.create(out, url, registry={"input.txt": SHA256}, urls={"input.txt": url}, retry_if_failed=2)
    try:
        storage.fetch("input.txt", progressbar=sys.stderr.isatty())
    except (requests.RequestException, ValueError) as error:  # ValueError: the sum is wrong
        reason = type(error).__name__ if isinstance(error, requests.ConnectionError) else error  # its text is urllib3's insides
        raise MachineError(f"cannot download {url}: {reason}; if you have a copy, use --from FILE") from None


if __name__ == "__main__":
    run(main, parse(ShakespeareOptions, doc=__doc__))
