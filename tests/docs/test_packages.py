"""CONTRIBUTING.md lists every package in the order of imports, and the diagram is the one that its script draws."""

import re
import sys

from test_imports import ORDER, ROOT

CELLS = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)


def test_the_list_of_packages_is_complete_and_in_the_order_of_imports():
    for top, text in ORDER.items():
        level = {word: i for i, words in enumerate(text.split("\n")) for word in words.split()}
        listed = re.findall(rf"`{top}/([\w/.]+)`", " ".join(CELLS))
        assert [name for name in listed if not (ROOT / top / name).exists()] == []
        assert {file.parent.name for file in (ROOT / top).glob("*/__init__.py")} <= set(listed)
        levels = [level[name.removesuffix(".py")] for name in listed]
        assert levels == sorted(levels)


def test_the_diagram_is_what_its_script_draws(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import draw_data_flow

    assert draw_data_flow.FILE.read_text() == draw_data_flow.draw()
