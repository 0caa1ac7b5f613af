"""data.sources.webdataset: what is found in tar files, and what is complained of."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import color, lines, shard, square

from data.sources.base import BadData
from data.sources.captions import Captions
from data.sources.webdataset import WebDataset

RED, LIME, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def test_files_of_one_name_are_one_sample_with_any_number_of_references(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "s.tar",
        {
            "a/1.jpg": square("red", kind="JPEG"),
            "a/1.txt": " one ",
            "a/1.ref10.png": square("white", 32),
            "a/1.ref2.webp": square("lime", kind="WEBP"),
            "a/1.ref0.png": square("blue"),
            "a/1.cls": "7",
            "b/1.png": square("lime"),
            "b/1.txt": "two",
            "README": "no sample",
        },
    )
    samples = WebDataset(path)
    assert [sample.name for sample in samples] == [f"{path}/a/1.jpg", f"{path}/b/1.png"]
    assert [sample.caption for sample in samples] == ["one", "two"]
    assert [round(value, -1) for value in color(samples[0].target)] == [250, 0, 0]
    blue, lime, white = samples[0].references
    assert (color(blue), color(white), white.size) == (BLUE, WHITE, (32, 32))
    assert color(lime)[1] > 250
    assert samples[1].references == ()
    assert color(samples[1].target) == LIME


def test_a_part_of_a_shard_reads_like_a_file_of_its_own(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", {"1.png": square(side=200), "1.txt": "x", "2.png": square("blue"), "2.txt": "x"})
    with WebDataset(path)[0].target.open() as stream:
        content = square(side=200)
        assert stream.read() == content
        assert stream.read(5) == b""
        assert stream.seek(-4, 2) == len(content) - 4
        assert stream.read(100) == content[-4:]
        stream.seek(2)
        stream.seek(3, 1)
        assert stream.read(7) == content[5:12]
        assert stream.seek(10**6) == 10**6
        assert stream.read() == b""


def test_captions_may_be_in_json_or_one_for_all(tmp_path: Path) -> None:
    row = {"caption": ["one", "two"], "other": "three"}
    path = shard(tmp_path / "s.tar", {"1.png": square(), "1.json": lines(row)})
    assert WebDataset(path, caption_column="caption")[0].captions == ("one", "two")
    assert WebDataset(path, caption_column="other", captions=Captions(trigger="t"))[0].caption == "t, three"
    assert WebDataset(path, prompt="all")[0].caption == "all"


def test_a_mask_is_a_file_of_the_sample(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "s.tar",
        {"1.png": square(), "1.txt": "x", "1.mask.png": square("white"), "2.png": square(), "2.txt": "y"},
    )
    assert [sample.mask and color(sample.mask) for sample in WebDataset(path, mask="mask")] == [WHITE, None]
    assert [sample.mask for sample in WebDataset(path)] == [None, None]


def test_shards_are_given_by_file_folder_or_pattern_and_read_in_order(tmp_path: Path) -> None:
    for number in (2, 1):
        shard(tmp_path / f"train-{number}.tar", {"1.png": square(), "1.txt": f"train {number}"})
    shard(tmp_path / "test-1.tar", {"1.png": square(), "1.txt": "test"})
    assert [sample.caption for sample in WebDataset(f"{tmp_path}/train-*.tar")] == ["train 1", "train 2"]
    assert [sample.caption for sample in WebDataset(tmp_path)] == ["test", "train 1", "train 2"]
    assert [sample.caption for sample in WebDataset(tmp_path / "train-2.tar")] == ["train 2"]


def made(**files: str | bytes) -> Callable[[Path], Path]:
    names = {name.removeprefix("_").replace("__", "."): content for name, content in files.items()}
    return lambda folder: shard(folder / "s.tar", names)


def cut(folder: Path) -> Path:
    path = shard(folder / "s.tar", {"1.png": square(), "1.txt": "x", "2.txt": "y" * 5000})
    path.write_bytes(path.read_bytes()[:3500])
    return path


def linked(folder: Path) -> Path:
    path = shard(folder / "s.tar", {"1.png": square(), "1.txt": "x"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("1.ref0.png")
        link.type, link.linkname = tarfile.LNKTYPE, "1.png"
        tar.addfile(link)
    return path


ONE = {"_1__png": square()}
TWO = {"_1__ref1__png": square(), "_1__ref01__png": square()}


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda folder: folder / "gone.tar", {}, r"gone\.tar'.* \.tar\b"),
        (lambda folder: folder, {}, r"dataset\.path=.* \.tar\b"),
        (made(), {}, r"s\.tar'?.*samples"),
        (made(**ONE), {}, r"s\.tar/1\b.*caption.* \.txt.*\.json.*dataset\.caption_column"),
        (made(**ONE), {"caption_column": "x"}, r"s\.tar/1\b.*caption.* \.json\b"),
        (made(**ONE, _1__json="{"), {"caption_column": "x"}, r"s\.tar/1\b.*\.json\b.*JSON"),
        (made(**ONE, _1__json='{"y": 1}'), {"caption_column": "x"}, r"s\.tar/1\b.*'x'.*\.json\b.* y\b"),
        (made(**ONE, _1__json="[1]"), {"caption_column": "x"}, r"s\.tar/1\b.*'x'.*\.json\b.*\[1\]"),
        (made(**ONE, _1__json='{"x": 1}'), {"caption_column": "x"}, r"s\.tar/1\b.*caption.*\b1\b"),
        (made(**ONE, _1__txt=b"\xff"), {}, r"s\.tar/1\b.*\.txt\b.*UTF-8"),
        (made(**ONE, _1__txt="x" * (1 << 21)), {}, r"s\.tar/1\b.*\.txt\b.*2097152 bytes"),
        (made(_1__txt="x", _1__ref0__png=square()), {}, r"s\.tar/1\b.*\.txt, \.ref0\.png"),
        (made(**ONE, _1__jpg=square(), _1__txt="x"), {}, r"s\.tar/1\b.*\.png\b.*\.jpg\b"),
        (made(_1__heic=b"x", _1__txt="x"), {}, r"s\.tar/1\b.*\.heic\b.*Pillow"),
        (made(_1__png=b"", _1__txt="x"), {}, r"s\.tar/1\.png\b.*empty"),
        (
            made(**ONE, _1__txt="x", _2__png=square(), _2__txt="y", _1__webp=square()),
            {},
            r"s\.tar/1\b.*\.png and \.webp",
        ),
        (linked, {}, r"s\.tar/1\b.*\.ref0\.png"),
        (made(**ONE, **TWO, _1__txt="x"), {}, r"s\.tar/1\b.*\.ref1, \.ref01"),
        (made(**ONE, _1__txt="x"), {"mask": "maks"}, r"dataset\.mask='maks'"),
        (cut, {}, r"s\.tar\b.*unexpected end of data"),
        (
            lambda folder: shard(folder / "s.tar", {"1.png": square()}, "w:gz"),
            {},
            r"s\.tar\b.*uncompressed",
        ),
        (made(**ONE), {"prompt": ""}, "prompt=''"),
        (made(**ONE), {"caption_column": 1}, r"caption_column=1\b"),
        (lambda _: None, {}, r"dataset\.path=None\b"),
    ],
)
def test_a_mistake_in_shards_is_one_clear_error(
    tmp_path: Path, prepare: Callable, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WebDataset(prepare(tmp_path), **arguments)


def test_what_can_be_read_of_a_damaged_shard_is_kept_if_that_is_allowed(tmp_path: Path) -> None:
    samples = WebDataset(cut(tmp_path), max_bad=2)
    assert [sample.caption for sample in samples] == ["x"]
    with pytest.raises(BadData):
        WebDataset(tmp_path / "s.tar", max_bad=0)
