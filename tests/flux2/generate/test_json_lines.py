"""flux2.generate.requests: a line of a file of prompts ends at a line feed, as JSON lines do."""

import json
from pathlib import Path

import pytest

from flux2.generate.requests import KEYS, read_lines


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
def test_a_character_that_only_looks_like_the_end_of_a_line_stays_in_its_prompt(tmp_path: Path, character: str) -> None:
    prompts = [f"a cup{character}on a table", "a fox"]
    raw = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "many.jsonl").write_bytes("\r\n".join(raw).encode())
    defaults = dict.fromkeys(KEYS) | {"seed": 0, "out": "x.png", "images": []}
    assert [request.prompt for request in read_lines(tmp_path / "many.jsonl", defaults, print)] == prompts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a red cup", "line 2 is not a JSON object"),
        ('{"prompt": "a", "width": 1' + 400 * "0" + "}", "line 2: width="),
        ('{"prompt": "a", "prompt": "b"}', "line 2: prompt is given twice"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "many.jsonl").write_text('{"prompt": "a fox"}\n' + line)
    defaults = dict.fromkeys(KEYS) | {"seed": 0, "out": "x.png", "images": []}
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path / "many.jsonl", defaults, print)
