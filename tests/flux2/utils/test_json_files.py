"""flux2.utils.json_files: a file from someone else ends in one ValueError, soon, whatever is in it."""

import math
import os
from pathlib import Path

import pytest

from flux2.utils.json_files import MOST_DEPTH, parse_json, read_json, read_text


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40, "", "{", "[1", '"\ud800'],
)
def test_what_is_not_json_or_too_deep_is_one_error_with_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "index.json"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"index\.json cannot be read"):
        read_json(file)


def test_the_depth_that_files_of_ours_have_is_read() -> None:
    text = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert parse_json(text) is not None
    with pytest.raises(ValueError, match="nested"):
        parse_json(f"[{text}]")


def test_an_integer_of_any_length_fits_into_a_float() -> None:
    assert parse_json(f"[{2**63}, -5]") == [2**63, -5]
    found = parse_json(f'{{"loss": 1{"0" * 400}, "seed": -1{"0" * 30}, "long": {"9" * 100_000}}}')
    assert found == {"loss": math.inf, "seed": -1e30, "long": math.inf}


def test_a_file_is_read_up_to_its_bound_and_only_if_it_is_one(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('"abc"')
    assert read_json(file, 5) == "abc"
    with pytest.raises(ValueError, match=r"a\.json has more than 4 bytes"):
        read_json(file, 4)
    os.mkfifo(tmp_path / "pipe")  # opening it would block
    for name in ("pipe", "nowhere", ".", "/dev/zero"):
        with pytest.raises(ValueError, match=r"is not a file|does not exist"):
            read_text(tmp_path / name)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.json cannot be read.*UTF-8"):
        read_json(file)
