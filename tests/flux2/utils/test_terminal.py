"""One look on a terminal, plain lines without one."""

import io
import re

import pytest

from flux2.utils.terminal import show, show_title, styled

LINES = [
    "warning: the disk is nearly full",
    "error: optimizer.lr=2 is a lot",
    "adapter   outputs/a b/adapter",
    "use it    python -m flux2.generate --prompt 'a  cup'",
    "  step     20  1.8521  -0.6 %  lowest",
    "best checkpoint: step 20 (-6.9 %, the only one measured)",
    "a plain line [bold]with brackets[/bold] :smile: and 12 numbers",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def colors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "60"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def without_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("line", LINES)
def test_a_terminal_changes_styles_alone(line: str) -> None:
    plain, colored = io.StringIO(), Terminal()
    for stream in (plain, colored):
        show(line * 20, stream)  # longer than the terminal is wide: a path or command to copy is not broken
        show(line, stream)
    assert plain.getvalue() == f"{line * 20}\n{line}\n"
    assert without_styles(colored.getvalue()) == plain.getvalue()


def styles(line: str) -> list[tuple[str, str]]:
    return [(line[span.start : span.end], str(span.style)) for span in styled(line).spans]


def test_what_stands_out() -> None:
    assert [styles(line) for line in LINES] == [
        [("warning:", "bold yellow")],
        [("error:", "bold red")],
        [("adapter", "cyan")],
        [("use it", "cyan"), ("python -m flux2.generate --prompt 'a  cup'", "bold")],
        [("-0.6 %", "green")],
        [("best checkpoint:", "bold green")],
        [],
    ]


def test_a_color_is_written_to_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in (True, False):
        stream = Terminal()
        show(LINES[0], stream)
        assert ("\x1b[" in stream.getvalue()) is wanted
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")


def test_a_name_cannot_move_the_cursor() -> None:
    for stream in (io.StringIO(), Terminal()):
        show("adapter   a\x1b[2Jb", stream)
        assert "\x1b[2J" not in stream.getvalue()
        assert "\\x1b[2Jb" in without_styles(stream.getvalue())


def test_a_title_is_for_a_terminal_alone() -> None:
    plain, colored = io.StringIO(), Terminal()
    show_title("training", plain)
    show_title("training", colored)
    assert plain.getvalue() == ""
    assert without_styles(colored.getvalue()) == f"training {'─' * 51}\n"
