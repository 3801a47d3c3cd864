"""Files and texts that anyone may have written: rows of a JSONL log, read as far as they are rows,
and texts as a terminal may show them."""

import json
import re
from pathlib import Path


def read_rows(path, is_row=None):
    """([row], skipped): the JSON objects of a JSONL file in order, and how many lines are none.

    Lines may be torn or foreign; blank ones are not counted. is_row(object) -> bool refuses more.
    Raises FileNotFoundError, ValueError for what is no regular file (a FIFO would never answer),
    and OSError for a file that cannot be read.
    """
    path, rows, skipped = Path(path), [], 0
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    try:
        for row in each_row(path):
            if row is not None and (is_row is None or is_row(row)):
                rows.append(row)
            else:
                skipped += 1
    except OSError as e:
        raise OSError(f"{path}: cannot be read ({e.strerror or e})") from None
    return rows, skipped


def each_row(path):
    """Yield every line of a JSONL file as the object it holds, or None where it is none: torn by a
    kill or a full disk, zeros after a power cut, edited. A missing file is an empty one; blank
    lines are passed over."""
    if not Path(path).exists():
        return
    with open(path, "rb") as lines:  # bytes: a line ends at \n, and not at U+2028 inside a text
        for line in lines:
            if line.strip():
                row = parse_json(line)
                yield row if isinstance(row, dict) else None


def parse_json(line):
    """The value that a line of bytes holds as JSON; None when it holds none."""
    try:
        return json.loads(line.decode("utf-8-sig"))  # -sig: some editors begin with a mark
    except (ValueError, RecursionError):  # no UTF-8, no JSON, 5,000 digits, nested too deep
        return None


# What a terminal obeys or hides: control characters and escapes, what reorders text, zero width,
# halves of a pair, tags. Not the joiners U+200C and U+200D, which belong to scripts and to emoji.
UNSEEN = re.compile(
    "[\0-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text, keep="\n\t") -> str:
    r"""Text of a data set or a model as it may be shown: \x1b and \u202e in place of characters
    that act on a terminal.

    keep: those that stay; "" for a text that has to fit into one line.
    """
    return UNSEEN.sub(
        lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), str(text)
    )


def one_line(parts) -> str:
    """What is wrong, in one line of bounded length: names come out of files, they may hold
    anything."""
    return " ".join("; ".join(parts).split())[:4000]


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError or FileNotFoundError with the path in one line."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")  # a pipe would keep us waiting for ever
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as e:
        raise ValueError(f"{path}: cannot be read as JSON ({str(e)[:80]})") from None
    if not isinstance(out, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    return out
