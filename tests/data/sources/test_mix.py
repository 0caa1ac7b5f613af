"""data.sources.mix: the weights of samples from several sources."""

from pathlib import Path

import pytest
from data_helpers import square, write

from data.sources.base import BadData
from data.sources.captions import Captions
from data.sources.folders import Folder
from data.sources.mix import Mix


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Folder]:
    """Three cats and one dog."""
    cats = {f"cat{number}.png": square() for number in range(3)}
    return {
        "cats": Folder(write(tmp_path / "cats", cats), prompt="a cat", captions=Captions(trigger="felix")),
        "dogs": Folder(write(tmp_path / "dogs", {"dog.png": square()}), prompt="a dog"),
    }


def weights(mix: Mix) -> list[float]:
    return [sample.weight for sample in mix]


def test_sources_follow_one_another_with_their_own_settings(sources: dict) -> None:
    mix = Mix(sources)
    assert [sample.caption for sample in mix] == ["felix, a cat"] * 3 + ["a dog"]
    assert weights(mix) == [1.0] * 4
    assert mix[3].target is sources["dogs"][0].target


def test_repeats_are_how_often_a_sample_is_trained_in_a_pass(sources: dict) -> None:
    assert weights(Mix(sources, repeats={"dogs": 3})) == [1.0, 1.0, 1.0, 3.0]
    assert weights(Mix(sources, repeats={"dogs": 0.5, "cats": 2})) == [2.0, 2.0, 2.0, 0.5]


def test_shares_are_of_all_training_whatever_the_sizes(sources: dict) -> None:
    found = weights(Mix(sources, shares={"cats": 30, "dogs": 70}))
    assert sum(found) == pytest.approx(4)
    assert sum(found[:3]) / sum(found) == pytest.approx(0.3)
    assert found[0] == found[1] == found[2]


def test_weights_of_mixes_multiply(sources: dict) -> None:
    inner = Mix(sources, repeats={"dogs": 3})
    assert weights(Mix({"all": inner}, repeats={"all": 2})) == [2.0, 2.0, 2.0, 6.0]


def test_a_mix_leaves_out_what_its_sources_do(tmp_path: Path) -> None:
    bad = Folder(write(tmp_path, {"a.png": square(), "b.png": b""}), prompt="x", max_bad=2)
    mix = Mix({"bad": bad})
    assert [Path(sample.name).name for sample in mix] == ["a.png"]
    assert [Path(name).name for name, _ in mix.bad] == ["b.png"]
    with pytest.raises(BadData, match=r"a\.png\b.*cannot be decoded"):
        mix.leave_out({0: "cannot be decoded"})


def test_what_is_left_out_later_is_its_sources_own_and_shares_stay(tmp_path: Path) -> None:
    def folder(name: str, count: int, max_bad: int) -> Folder:
        files = {f"{number}.png": square() for number in range(count)}
        return Folder(write(tmp_path / name, files), prompt=name, max_bad=max_bad)

    made = {"a": folder("a", 10, 8), "b": folder("b", 10, 0)}
    mix = Mix(made, shares={"a": 7, "b": 3})
    mix.leave_out(dict.fromkeys(range(1, 9), "is too small"))
    assert [sample.caption for sample in mix] == ["a"] * 2 + ["b"] * 10
    assert sum(weights(mix)[:2]) / sum(weights(mix)) == pytest.approx(0.7)
    assert len(mix.bad) == 8
    with pytest.raises(BadData, match=r"1 of 10 samples\b.*/b\b.*\n.*is too small"):
        mix.leave_out({5: "is too small"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": {"birds": 2}}, r"dataset\.repeats\.birds\b.* cats, dogs"),
        ({"repeats": {"cats": 0}}, r"dataset\.repeats\.cats=0\b"),
        ({"repeats": {"cats": float("nan")}}, r"dataset\.repeats\.cats=nan\b"),
        ({"repeats": {"cats": True}}, r"dataset\.repeats\.cats=True\b"),
        ({"repeats": 3}, r"dataset\.repeats=3\b"),
        ({"repeats": {"cats": 1_000_000_000}}, r"dataset\.repeats\.cats=1000000000\b.* 10000\b"),
        ({"repeats": {"cats": 1e-300}}, r"dataset\.repeats\.cats=1e-300\b"),
        ({"shares": {"cats": 1e-300, "dogs": 1}}, r"dataset\.shares\.cats=1e-300\b"),
        ({"shares": {"cats": 1, "dogs": "x"}}, r"dataset\.shares\.dogs='x'"),
        ({"shares": {"cats": 1}}, r"dataset\.shares\b.* dogs\b"),
        ({"shares": {"cats": "1", "dogs": 1}}, r"dataset\.shares\.cats='1'"),
        ({"shares": {"cats": 1, "dogs": 1}, "repeats": {"cats": 2}}, r"dataset\.\w+.*(repeats|shares)\b"),
        ({"sources": {}}, r"dataset\.sources=\{\}"),
        ({"sources": {"cats": 3}}, r"dataset\.sources\.cats\b"),
    ],
)
def test_a_mistaken_mix_is_one_clear_error(sources: dict, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mix(**({"sources": sources} | settings))
