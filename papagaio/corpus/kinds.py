"""Tells text and tables from files that hold no text for a model, by their names and their first bytes."""

import codecs
import os
import re
from pathlib import Path

from papagaio.corpus.rows import byte_order_mark, uncompressed_suffix
from papagaio.corpus.text import blocks_of
from papagaio.errors import UserError
from papagaio.files import GIVE_TEXT, printable, refuse_pickle

HEAD_BYTES = 8192
TABLES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = {
    "images": ".png .jpg .jpeg .gif .bmp .webp .tif .tiff .ico .svg .heic .psd",
    "audio and video": ".mp3 .wav .flac .ogg .m4a .mp4 .mkv .avi .mov .webm",
    "PDF": ".pdf",
    "office documents": ".doc .docx .xls .xlsx .ppt .pptx .odt .ods .odp .rtf .epub",
    "web pages": ".html .htm .xhtml .mhtml",
    "archives": ".zip .tar .tgz .tbz2 .txz .7z .rar .jar .whl .deb .rpm .iso",
    "programs": ".exe .dll .so .o .a .dylib .pyc .class .wasm",
    "weights and arrays": ".npy .npz .pt .pth .ckpt .pkl .pickle .safetensors .gguf .onnx .h5 .bin",
    "databases and fonts": ".db .sqlite .sqlite3 .ttf .otf .woff .woff2",
}
KIND_OF = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes.split()}
MAGIC = {
    b"%PDF-": "PDF",
    b"\x89PNG": "images",
    b"\xff\xd8\xff": "images",
    b"PK\x03\x04": "archives",
    b"\x1f\x8b\x08": "archives",
    b"7z\xbc\xaf\x27\x1c": "archives",
    b"Rar!\x1a\x07": "archives",
    b"BZh91AY&SY": "archives",
    b"\xfd7zXZ\0": "archives",
    b"\x28\xb5\x2f\xfd": "archives",
    b"\xd0\xcf\x11\xe0": "office documents",
    b"{\\rtf": "office documents",
    b"\x7fELF": "programs",
}
ADVICE = {
    "PDF": "extract its text first (pdftotext does)",
    "office documents": "save it as text first",
    "web pages": "extract its text first, or read it with its markup by --format text",
    "archives": "unpack it first",
}
CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\b\x1b"))  # bytes that are hardly ever in text


def kind_of(path: str, as_text: bool = False, encoding: str = "utf-8") -> str | None:
    """The kind of a file that is no text, by its name and its first bytes; None for text and tables.

    With `as_text` web pages are text. A damaged compressed file counts as text: its reader says what is wrong.
    """
    suffix = uncompressed_suffix(path)
    kind = KIND_OF.get(suffix)
    if kind and not (as_text and kind == "web pages"):
        return kind
    try:
        refuse_pickle(Path(path), GIVE_TEXT)
        head = b"".join(blocks_of(path, 0, HEAD_BYTES))
    except UserError as error:
        return "weights and arrays" if GIVE_TEXT in str(error) else None
    except OSError:
        return "unreadable"
    if kind := next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None):
        return kind
    if head[257:262] == b"ustar":
        return "archives"
    if not as_text and re.match(rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype html|html)\b", head, re.IGNORECASE | re.DOTALL):
        return "web pages"
    wide = byte_order_mark(head) == "utf-16" or encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))
    return "binary files" if is_binary(head) and not wide and not head.startswith(b"PAR1") else None


def is_binary(head: bytes) -> bool:
    """Whether the first bytes of a file are no text, unless in UTF-16. A single NUL byte in text may be a mistake."""
    strange = head.translate(None, delete=bytes({*range(256)} - set(CONTROLS)))
    try:
        suspicious = b"\0" in head or not codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        suspicious = True
    return len(strange) > 0.3 * len(head) or (suspicious and len(set(strange)) > 2)


def check_named(name: str, as_text: bool, encoding: str) -> None:
    """Raises UserError if a file that the user names cannot be used, with what to do instead."""
    place = printable(name)
    if not os.path.lexists(name):
        raise UserError(f"{place}: no such file or directory")
    if not os.path.isfile(name) or not os.access(name, os.R_OK):
        raise UserError(f"{place}: cannot be read; readable regular files are needed, and - for standard input")
    refuse_pickle(Path(name), GIVE_TEXT)
    if kind := kind_of(name, as_text, encoding):
        raise UserError(f"{place}: {kind} are not read; {ADVICE.get(kind, 'give text')}".replace("PDF are", "PDF files are"))
