"""The tables of README.md are those of the committed results and of the planner."""

import pytest

from benchmarks import tables


def test_the_measured_tables_are_those_of_the_results():
    text = tables.README.read_text()
    places = {match.group(2) for match in tables.TABLE.finditer(text)}
    assert places == set(tables.TABLES)
    assert tables.update_tables(text, sorted(places - {"fits"})) == text, "run python benchmarks/tables.py"


@pytest.mark.slow
def test_the_predicted_table_is_the_planners():
    text = tables.README.read_text()
    assert tables.update_tables(text, ["fits"]) == text, "run python benchmarks/tables.py"


def test_only_the_tables_are_written(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "steps", lambda: "new\n")
    text = "before\n<!-- table: steps -->\nold\n<!-- end -->\nbetween\n<!-- table: fits -->\nkept\n<!-- end -->\n"
    assert tables.update_tables(text, ["steps"]) == text.replace("old", "new")
    with pytest.raises(ValueError, match="other"):
        tables.update_tables("<!-- table: other -->\n<!-- end -->")


def test_predicted_figures_are_next_to_measured_ones():
    ours = {
        "memory": {"checkpointing": "full", "budget_gb": None, "offload_blocks": 12},
        "GB": {"allocated": 21.04, "predicted": 20.5},
        "seconds": {"median": 7.0},
        "predicted seconds": 7.4,
    }
    result = {"hardware": "GPU", "runs": {"dev nf4 1024 24": ours, "dev bf16 1024 8": {"skipped": "too small"}}}
    _, _, ours, other = tables.runs(result).splitlines()
    expected = "checkpointing=full, offload_blocks=12 | 21.0 GB (20.5 predicted) | 7.00 s (7.40 predicted)"
    assert ours == f"| dev nf4 1024 24 | {expected} |"
    assert other == "| dev bf16 1024 8 | too small |  |  |"


def test_a_skipped_case_shows_the_reason():
    result = {
        "hardware": "GPU",
        "what": "dev",
        "cases": {
            "ours": {"seconds": {"median": 0.5, "min": 0.4, "max": 0.6}, "GB": {"allocated": 30.0}},
            "theirs": {"out of memory": "asked for too much"},
        },
    }
    _, _, ours, theirs = tables.matrix(result).splitlines()
    assert ours == "| ours | 0.500 s (0.400 to 0.600) | 30.0 GB |  |"
    assert theirs == "| theirs | asked for too much |  |  |"
