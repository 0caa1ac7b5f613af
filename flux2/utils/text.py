"""Names, sizes and command lines as text for messages."""

import re
import shlex
import sys
from collections.abc import Iterable

# control characters but for the ends of lines and tabs, those that turn the direction of writing, and parts of file
# names that are not UTF-8, which cannot be printed
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return `text` for a terminal: a name or message from outside could move the cursor, or set the clipboard."""
    return CONTROLS.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return up to `most` of the names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def gigabytes(size: float) -> str:
    """Return a size in bytes as text: `1.50 GB`, `20.0 MB`."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def quote_word(word: str) -> str:
    """Return a word as one types it in a shell: sh, or on Windows PowerShell from 7.3 on.

    Both read single quotes alike, without an apostrophe in them, and double quotes around one; so does `split_words`.
    """
    if sys.platform != "win32":
        return shlex.quote(word)
    if re.fullmatch(r"[\w+=:./-]+", word, re.ASCII):  # a comma makes a list
        return word
    if "'" in word and not re.search(r"[$`\"\\]", word):
        return f'"{word}"'
    return "'" + word.replace("'", "''") + "'"


def join_words(words: Iterable[str]) -> str:
    """Return a command as one types it in a shell."""
    return " ".join(map(quote_word, words))


def split_words(line: str) -> list[str]:
    """Return the words of a command line. Raise ValueError for a quote that is not closed."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if sys.platform == "win32":
        lexer.escape = ""  # a backslash separates folders
    return list(lexer)
