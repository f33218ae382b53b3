"""What a file of text is: plain UTF-8, or JSON Lines with a text in each record.

Both are read so that the same words give the same characters: lines end in ``\\n`` whatever ended
them in the file, and a byte-order mark is left out. A model takes ``\\r`` for a token that it
has hardly seen, and whatever is measured on such text is wrong. A table, an archive or text in
another encoding would be wrong too, so that those are refused, with the way to convert them.
"""

import codecs
import json
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from ..errors import InputError

TEXT_KEY = "text"
"""The key of a record that holds its text."""
LINE_END = re.compile(rb"[\r\n]")
_HEAD_BYTES = 64 * 1024
_RECORD_SUFFIXES = {".jsonl", ".ndjson", ".json"}

_TABLE = (
    f'is a table, not text: write its text column as JSON Lines, one {{"{TEXT_KEY}": "..."}} a line'
)
_PACKED = "is compressed: unpack it first"
_LAYOUT = "is a document with layout, not text: save it as plain text"
_SUFFIXES = {
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".arrow", ".feather", ".orc"), _TABLE),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".db", ".sqlite"), _TABLE),
    **dict.fromkeys((".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tar"), _PACKED),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".rtf"), _LAYOUT),
    ".ipynb": "is a notebook, not text: convert it with jupyter nbconvert --to markdown",
}
_MARKS = {
    b"PAR1": _TABLE,
    b"ARROW1": _TABLE,
    b"SQLite format 3": _TABLE,
    b"\x1f\x8b": _PACKED,
    b"\x28\xb5\x2f\xfd": _PACKED,
    b"\xfd7zXZ": _PACKED,
    b"BZh91AY&SY": _PACKED,
    b"PK\x03\x04": _PACKED,
    b"7z\xbc\xaf\x27\x1c": _PACKED,
    b"%PDF-": _LAYOUT,
    codecs.BOM_UTF32_LE: "is not UTF-8 text but UTF-32: convert it (iconv -f UTF-32 -t UTF-8)",
    codecs.BOM_UTF32_BE: "is not UTF-8 text but UTF-32: convert it (iconv -f UTF-32 -t UTF-8)",
    codecs.BOM_UTF16_LE: "is not UTF-8 text but UTF-16: convert it (iconv -f UTF-16 -t UTF-8)",
    codecs.BOM_UTF16_BE: "is not UTF-8 text but UTF-16: convert it (iconv -f UTF-16 -t UTF-8)",
}
"""First bytes -> what to do; the mark of UTF-32 begins with that of UTF-16."""


class TextFormat(StrEnum):
    """How a file holds its text."""

    PLAIN = "plain"
    RECORDS = "records"


def find_format(path: Path) -> TextFormat:
    """Say how a file holds its text, by its name and its first lines.

    Records are files called .jsonl, .ndjson or .json, and those whose first line is a JSON object.
    Raises InputError, beginning with the path, for what isn't text or can't be read as text here;
    OSError where the file can't be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    suffix = path.suffix.lower()
    reason = _SUFFIXES.get(suffix) if head else None
    reason = next((why for mark, why in _MARKS.items() if head.startswith(mark)), reason)
    if reason is not None:
        raise InputError(f"{path} {reason}")
    check_binary(head, path)
    if suffix in _RECORD_SUFFIXES:
        if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise InputError(
                f"{path} is one JSON array: write one record a line (jq -c '.[]' makes JSON Lines)"
            )
        return TextFormat.RECORDS
    first = LINE_END.split(head.removeprefix(codecs.BOM_UTF8).lstrip(), maxsplit=1)[0]
    if not first.startswith(b"{"):
        return TextFormat.PLAIN
    try:
        return TextFormat.RECORDS if json.loads(first) else TextFormat.PLAIN
    except ValueError:
        return TextFormat.PLAIN


def check_binary(data: bytes, path: Path) -> None:
    """Raise InputError for zero bytes, which text doesn't have."""
    if b"\0" in data:
        raise InputError(f"{path} is not UTF-8 text (it holds zero bytes): binary data, or UTF-16")


def normalize_newlines(text: str) -> str:
    """Return the text with every line ended by ``\\n``."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_record(line: str | bytes, place: str) -> str:
    """Return a record's text; InputError, with the place, unless it has one under ``TEXT_KEY``."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is not a JSON record ({error}): one a line is needed") from error
    if not isinstance(record, dict) or not isinstance(record.get(TEXT_KEY), str):
        if not isinstance(record, dict):
            found = f"is a JSON {type(record).__name__}, not an object"
        elif TEXT_KEY in record:
            found = f"has a {type(record[TEXT_KEY]).__name__} as its {TEXT_KEY!r}"
        else:
            keys = ", ".join(map(repr, list(record)[:10])) or "none"
            found = f"has no {TEXT_KEY!r}, its keys are {keys}"
        raise InputError(f"{place} {found}: give each record its text under {TEXT_KEY!r}")
    return normalize_newlines(record[TEXT_KEY])


def read_records(path: Path) -> Iterator[str]:
    """Yield the text of each record of a file, in its order; blank lines are passed over."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield parse_record(line, f"{path}, line {number},")
