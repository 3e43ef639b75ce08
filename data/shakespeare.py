"""Tiny Shakespeare, 1,115,394 bytes of plays in one text file: downloaded or copied, and verified by its sha256.

python data/shakespeare.py --out out/shakespeare                       -> out/shakespeare/input.txt
python data/shakespeare.py --out out/shakespeare --from my_copy.txt    the same without a network
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.errors import MachineError, UserError, run
from papagaio.files import write_whole
from papagaio.options import Options, option, parse

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class ShakespeareOptions(Options):
    """Options of data/shakespeare.py."""

    out: Path = option(..., "directory for input.txt")
    from_: Path | None = option(None, "a copy of the file, instead of the download")
    url: str = option(URL, "where to download from", pattern=r"^https?://")


def main(config: ShakespeareOptions) -> None:
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out={config.out}: a file; a directory is needed")
    if config.from_ is None:
        download(config.url, config.out)
        return
    try:
        text = config.from_.read_bytes()
    except OSError as error:
        raise UserError(f"--from={config.from_}: {error.strerror}; a copy of {URL} is needed") from None
    if (found := hashlib.sha256(text).hexdigest()) != SHA256:
        raise UserError(f"--from={config.from_}: another text: its sha256 is {found}, Tiny Shakespeare's is {SHA256}")
    config.out.mkdir(parents=True, exist_ok=True)
    write_whole(config.out / "input.txt", text.decode())


def download(url: str, out: Path) -> None:
    import pooch
    import requests

    # pooch writes to a temporary file and renames it if the hash is right. It waits 1 s before the second attempt, then 2 s.
    storage = pooch.create(out, url, registry={"input.txt": SHA256}, urls={"input.txt": url}, retry_if_failed=2)
    try:
        storage.fetch("input.txt", progressbar=sys.stderr.isatty())
    except (requests.RequestException, ValueError) as error:  # ValueError: the hash is wrong
        # The text of a ConnectionError is about urllib3's internals.
        reason = type(error).__name__ if isinstance(error, requests.ConnectionError) else error
        raise MachineError(f"cannot download {url}: {reason}; if you have a copy, use --from FILE") from None


if __name__ == "__main__":
    run(main, parse(ShakespeareOptions, doc=__doc__))
