"""The look of all commands on a terminal; where there is none, their plain lines."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, TextIO

from flux2.utils.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# what begins a line, and its style
PREFIXES = {
    "warning:": "bold yellow",
    "error:": "bold red",
    "careful": "bold yellow",
    "note:": "cyan",
    "best checkpoint:": "bold green",
    "no checkpoint is recommended": "yellow",
    "recommended": "bold green",
}
LABEL = re.compile(r"(?=.{9} \S)[a-z]+(?: [a-z]+)*(?=  )")  # in a column of its own: `adapter   outputs/...`
COMMAND = re.compile(r"(?:^|  )((?:python|accelerate|flux2) .*)")  # to copy
GAIN = re.compile(r"(?<=  )[+-]\d+\.\d %")  # of a validation loss against the base's
BAD = re.compile(r"\b(?:DAMAGED|WRONG|FAILED)\b")


def console(stream: TextIO | None = None) -> Console:
    """Return a console of rich for `stream`, by default stdout, that changes nothing but the styles of a text.

    It follows NO_COLOR and TERM.
    """
    from rich.console import Console

    return Console(file=stream or sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)


def styled(line: str) -> Text:
    """Return a line in which warnings, labels and commands to copy stand out."""
    from rich.text import Text

    text = Text(line)
    for prefix, style in PREFIXES.items():
        if line.startswith(prefix):
            text.stylize(style, 0, len(prefix))
            break
    else:
        if label := LABEL.match(line):
            text.stylize("cyan", *label.span())
    if command := COMMAND.search(line):
        text.stylize("bold", *command.span(1))
    for gain in GAIN.finditer(line):
        text.stylize("green" if gain[0].startswith("-") else "yellow", *gain.span())
    for bad in BAD.finditer(line):
        text.stylize("bold red", *bad.span())
    return text


def show(text: object, stream: TextIO | None = None, style: str = "") -> None:
    """Print a line or lines to `stream`, by default stdout, without control characters that a name in it may have.

    `style`: of the whole on a terminal, in the terms of rich.
    """
    stream, clean = stream or sys.stdout, printable(str(text))
    if stream.isatty():
        screen = console(stream)
        for line in clean.split("\n"):
            screen.print(styled(line), style=style)
    else:
        print(clean, file=stream)
    stream.flush()


def show_title(text: str, stream: TextIO | None = None) -> None:
    """Print a rule with the title of what follows, on a terminal alone."""
    stream = stream or sys.stdout
    if stream.isatty():
        from rich.rule import Rule
        from rich.text import Text

        console(stream).print(Rule(Text(printable(text), "bold"), align="left", style="dim"))
        stream.flush()
