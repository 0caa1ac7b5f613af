"""flux2.generate.progress: a bar on a terminal, whole lines in a log, and never the two on one line."""

import io
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import flux2
from flux2.generate.progress import Screen

ROOT = Path(__file__).resolve().parents[3]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def seconds() -> object:
    """A clock that goes on by two seconds each time."""
    times = iter(range(0, 100, 2))
    return lambda: float(next(times))


def two_pictures(stream: io.StringIO) -> str:
    with closing(Screen(4, stream, seconds())) as screen:  # type: ignore[arg-type]
        screen.status("reading prompts")
        screen.begin()
        for name in ("a.png", "b.png"):
            for _ in range(2):
                screen.step()
            with screen.image_done(f"{name}: 2 steps"):
                stream.write(f"<{name}>")  # as if both streams were one
    return stream.getvalue()


def test_a_log_gets_a_line_a_picture_and_no_carriage_return() -> None:
    text = two_pictures(io.StringIO())
    assert "\r" not in text
    assert text == "a.png: 2 steps in 2.0 s\n<a.png>b.png: 2 steps in 2.0 s\n<b.png>"


def test_a_terminal_gets_a_bar_that_makes_way_for_names() -> None:
    text = two_pictures(Terminal())
    assert "reading prompts ...\r" in text
    assert "4/4" in text or "2/4" in text
    for name in ("a.png", "b.png"):
        before = text[: text.index(f"<{name}>")]
        assert before.rpartition("\r")[2].strip(" \x1b[K") == "", "the line is not empty where the name is written"
    assert text.rpartition("\r")[2].strip(" \x1b[K") == "", "the last line is not empty at the end"


def test_nothing_heavy_is_imported_before_the_command_can_say_something() -> None:
    code = "import sys, flux2; print('load' in flux2.__all__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
    assert callable(flux2.load), "and is imported when it is asked for"
