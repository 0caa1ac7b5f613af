"""data.sources.folders: what is found in folders, beside pictures, in metadata and in pairs, and what is complained
of.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import color, lines, square, write

from data.sources.base import BadData
from data.sources.captions import Captions
from data.sources.folders import Folder, Pairs

RED, LIME, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
EMPTY_ALLOWED = Captions(allow_empty=True)


def names(samples: Folder | Pairs) -> list[str]:
    return [str(Path(sample.name).relative_to(samples.path)) for sample in samples]


def captions(samples: Folder | Pairs) -> list[str]:
    return [sample.caption for sample in samples]


# --- what would be silently wrong


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "a.png"}\n{"file_name": "a.png", "text": "x", "text": "y"}',
            "text",
        ),
        ("metadata.csv", "file_name,text,text,,\na.png,x,y,,\n", "text"),
    ],
)
def test_a_key_or_column_twice_is_refused(name: str, text: str, key: str, tmp_path: Path) -> None:
    write(tmp_path, {"a.png": square(), name: text})
    line = 2 if name == "metadata.jsonl" else 1
    with pytest.raises(ValueError, match=rf"{name} line {line} has the .* '{key}' twice: remove"):
        Folder(tmp_path)


@pytest.mark.parametrize("reference", ["a.png", "deep/../a.png", "link.png", "hard.png"])
def test_an_image_that_is_its_own_reference_is_refused(reference: str, tmp_path: Path) -> None:
    write(tmp_path, {"a.png": square(), "b.png": square(), "deep/x.txt": "x"})
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": "x", "references": ["b.png", reference]}
    write(tmp_path, {"metadata.jsonl": lines(row)})
    with pytest.raises(BadData, match=r"a\.png is its own reference") as caught:
        Folder(tmp_path)
    assert str(caught.value).count("own reference") == 1


def test_pairs_of_one_file_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"target/a.png": square(), "target/a.txt": "x", "target/b.png": square(), "target/b.txt": "x"})
    write(tmp_path, {"source/b.png": square()})  # other files may be alike: nothing is to change in that edit
    (tmp_path / "source/a.png").symlink_to(tmp_path / "target/a.png")
    with pytest.raises(BadData, match=r"1 of 2 .*\n.*target/a\.png is its own reference"):
        Pairs(tmp_path)


# --- captions beside the pictures


def test_sidecar_captions_are_stripped_and_come_in_order_of_names(tmp_path: Path) -> None:
    write(tmp_path, {"b.png": square("blue"), "a.JPG": square(), "c.webp": square(kind="WEBP")})
    write(tmp_path, {"a.txt": " a red\n square \n", "b.txt": "\ufeffb", "c.txt": "", "._a.png": "litter", "n.md": "x"})
    samples = Folder(str(tmp_path), captions=EMPTY_ALLOWED)
    assert captions(samples) == ["a red\n square", "b", ""]
    assert names(samples) == ["a.JPG", "b.png", "c.webp"]
    assert color(samples[1].target) == BLUE
    assert (samples[0].references, samples[0].mask, samples[0].weight) == ((), None, 1.0)


def test_a_source_is_a_sequence(tmp_path: Path) -> None:
    samples = Folder(write(tmp_path, {"a.png": square(), "a.txt": "a", "b.png": square(), "b.txt": "b"}))
    assert len(samples) == 2
    assert samples[-1].caption == "b"
    assert [sample.caption for sample in samples[:5]] == ["a", "b"]
    with pytest.raises(IndexError):
        samples[2]


def test_one_prompt_for_all_needs_no_text_files(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": square(), "b.png": square(), "b.jpg": square(kind="JPEG"), "b.txt": "not this"})
    assert captions(Folder(tmp_path, prompt="a square")) == ["a square"] * 3


def test_subfolders_count_only_on_request_and_may_have_metadata(tmp_path: Path) -> None:
    write(tmp_path, {"b.png": square(), "b.txt": "b", "a/c.png": square(), "a/c.txt": "c", ".git/x.png": "x"})
    rows = lines({"file_name": "1.png", "text": "one"}, {"file_name": "deep/2.png", "text": "two"})
    write(tmp_path, {"d/metadata.jsonl": rows, "d/1.png": square(), "d/deep/2.png": square(), "d/3.png": "unnamed"})
    assert names(Folder(tmp_path)) == ["b.png"]
    samples = Folder(tmp_path, recursive=True)
    assert names(samples) == ["b.png", "a/c.png", "d/1.png", "d/deep/2.png"]
    assert captions(samples) == ["b", "c", "one", "two"]


def test_masks_may_be_a_folder_beside_the_pictures(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": square(), "a.txt": "a", "in/b.png": square(), "in/b.txt": "b"})
    write(tmp_path, {"masks/a.png": square("white"), "masks/in/b.jpg": square("black", kind="JPEG")})
    samples = Folder(tmp_path, recursive=True, mask="masks")
    assert names(samples) == ["a.png", "in/b.png"]
    assert [color(sample.mask) for sample in samples] == [WHITE, BLACK]
    (tmp_path / "masks/a.png").unlink()
    with pytest.raises(BadData, match=r"a\.png\b.*mask.*/masks\b"):
        Folder(tmp_path, recursive=True, mask="masks")
    write(tmp_path, {"masks/a.png": square("white"), "masks/a.jpg": square("white", kind="JPEG")})
    with pytest.raises(BadData, match=r"a\.png\b.*masks.*a\.jpg\b.*a\.png\b"):
        Folder(tmp_path, recursive=True, mask="masks")


# --- metadata


def test_metadata_gives_captions_and_references_in_the_order_of_its_lines(tmp_path: Path) -> None:
    rows: tuple[dict, ...] = (
        {"file_name": "b.png", "text": " second ", "before": "a.png", "extra": ["a.png", "c.png"], "unused": 3},
        {"file_name": "a.png", "text": "line\u2028separator", "before": None, "extra": []},
    )
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write(tmp_path, {"a.png": square("red"), "b.png": square("blue"), "c.png": square(), "metadata.jsonl": text})
    first, second = Folder(tmp_path, reference_columns=["before", "extra"])
    assert (first.caption, second.caption) == ("second", "line\u2028separator")
    assert [Path(p.name).name for p in (first.target, *first.references)] == ["b.png", "a.png", "a.png", "c.png"]
    assert second.references == ()
    assert Folder(tmp_path)[0].references == ()


def test_the_column_references_is_used_by_itself_and_may_be_missing_in_a_row(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "x", "references": ["sub/b.png", "c.png", "d.png"]},
        {"file_name": "a.png", "text": "y", "references": "c.png"},
        {"file_name": "a.png", "text": "z"},
    ]
    write(
        tmp_path,
        {"sub/b.png": square("blue"), "c.png": square("white", 48)} | dict.fromkeys(("a.png", "d.png"), square()),
    )
    write(tmp_path, {"metadata.jsonl": lines(*rows)})
    samples = Folder(tmp_path)
    assert [[color(picture) for picture in sample.references] for sample in samples] == [
        [BLUE, WHITE, RED],
        [WHITE],
        [],
    ]
    assert [sample.references for sample in Folder(tmp_path, reference_columns=[])] == [(), (), ()]


def test_a_caption_in_metadata_may_be_a_list(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": square(), "metadata.jsonl": lines({"file_name": "a.png", "text": ["one", " two"]})})
    (sample,) = Folder(tmp_path, captions=Captions(trigger="t"))
    assert sample.captions == ("t, one", "t, two")


def test_metadata_columns_can_be_renamed(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": square(), "metadata.jsonl": lines({"img": "a.png", "prompt": "hello"})})
    assert Folder(tmp_path, "prompt", "img")[0].caption == "hello"


def test_a_prompt_stands_in_for_the_caption_column_and_keeps_references(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "references": ["b.png"]}
    write(tmp_path, {"a.png": square(), "b.png": square("blue"), "metadata.jsonl": lines(row)})
    (sample,) = Folder(tmp_path, prompt="make it red")
    assert (sample.caption, color(sample.references[0])) == ("make it red", BLUE)


def test_csv_gives_the_same_as_jsonl(tmp_path: Path) -> None:
    text = (
        "\ufefffile_name,text,references,before,mask\r\n"
        'a.png,"a ""red"" one,\nof two lines","[""b.png"", ""[1].png""]",b.png,b.png\r\n'
        "b.png,[a tag] blue,[1].png,,\r\n"
        "[1].png,plain,,,\r\n"
    )
    write(tmp_path, {"a.png": square(), "b.png": square("blue"), "[1].png": square("white"), "metadata.csv": text})
    samples = Folder(tmp_path, reference_columns=["references", "before"], mask="mask")
    assert captions(samples) == ['a "red" one,\nof two lines', "[a tag] blue", "plain"]
    colors = [[color(picture) for picture in sample.references] for sample in samples]
    assert colors == [[BLUE, WHITE, BLUE], [WHITE], []]
    assert [sample.mask and color(sample.mask) for sample in samples] == [BLUE, None, None]


def test_a_picture_may_have_several_lines_but_not_the_same_twice(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": text} for text in ("x", "y")]
    write(tmp_path, {"a.png": square(), "metadata.jsonl": lines(*rows)})
    assert captions(Folder(tmp_path)) == ["x", "y"]
    write(tmp_path, {"metadata.jsonl": lines(*rows, rows[0])})
    with pytest.raises(BadData, match=r"1 of 3 .*\n.*a\.png\b.*duplicate"):
        Folder(tmp_path)


def test_a_link_out_of_the_folder_is_followed(tmp_path: Path) -> None:
    write(tmp_path, {"else.png": square("blue"), "data/metadata.jsonl": lines({"file_name": "a.png", "text": "x"})})
    (tmp_path / "data/a.png").symlink_to(tmp_path / "else.png")
    assert color(Folder(tmp_path / "data")[0].target) == BLUE


def test_references_that_many_samples_name_are_one_picture(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": str(number), "references": "b.png"} for number in range(3)]
    write(tmp_path, {"a.png": square(), "b.png": square(), "metadata.jsonl": lines(*rows)})
    samples = Folder(tmp_path)
    assert samples[0].references[0] is samples[2].references[0]


# --- what is wrong with a folder


def jsonl(text: str) -> Callable[[Path], Path]:
    return lambda folder: write(folder, {"a.png": square(), "metadata.jsonl": text})


def csv(text: str) -> Callable[[Path], Path]:
    return lambda folder: write(folder, {"a.png": square(), "metadata.csv": text})


def dangling(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder, {"b.png": square(), "b.txt": "x", **({"a.png": square()} if name == "a.txt" else {"a.txt": "x"})})
        (folder / name).symlink_to(folder / "gone")
        return folder

    return make


def pictures(**files: str | bytes) -> Callable[[Path], Path]:
    return lambda folder: write(folder, {name.replace("_", "."): content for name, content in files.items()})


GOOD = lines({"file_name": "a.png", "text": "x"})


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda folder: folder / "gone", {}, "gone'"),
        (lambda folder: write(folder, {"a.txt": "x"}) / "a.txt", {}, r"a\.txt'.*folder"),
        (pictures(a_txt="x"), {}, r"/test_.*\.jpeg.*dataset\.recursive=true"),
        (pictures(a_txt="x"), {"recursive": True}, r"/test_.*\.jpeg((?!recursive).)*$"),
        (pictures(a_png=square(), a_txt=b"\xff\xfe\xff"), {}, r"a\.png\b.*caption.*a\.txt\b.*UTF-8"),
        (pictures(a_heic=b"", b_png=square(), b_txt="b"), {}, r"a\.heic\b.*Pillow"),
        (
            pictures(a_png=square()),
            {},
            r"a\.png\b.*caption.*a\.txt\b.*metadata\.jsonl",
        ),
        (pictures(a_png=square(), a_txt="a"), {"caption_column": "t"}, r"caption_column='t'.*metadata\.jsonl\b"),
        (
            pictures(a_png=square(), a_txt="a"),
            {"reference_columns": ["t"]},
            r"reference_columns=\['t'\].*metadata\.jsonl\b",
        ),
        (pictures(a_png=square(), a_txt="a"), {"mask": "masks"}, r"dataset\.mask='.*masks'"),
        (pictures(a_png=square(), a_jpg=square(), a_txt=""), {}, r"a\.jpg\b.*caption.*a\.png\b"),
        (pictures(metadata_jsonl=GOOD, metadata_csv="x"), {}, r"metadata\.jsonl\b.*metadata\.csv\b"),
        (jsonl(GOOD + "{oops\n"), {}, r"metadata\.jsonl line 2\b.*JSON"),
        (jsonl(GOOD + "[1]\n"), {}, r"line 2\b.*'\[1\]'.*JSON object"),
        (jsonl(GOOD), {"caption_column": "caption"}, r"metadata\.jsonl\b.*'caption'.*file_name, text"),
        (jsonl(GOOD), {"reference_columns": ["before"]}, r"metadata\.jsonl\b.*'before'.*file_name, text"),
        (jsonl(GOOD), {"mask": "mask"}, r"metadata\.jsonl\b.*'mask'.*file_name, text"),
        (
            jsonl(GOOD + lines({"file_name": "a.png"})),
            {},
            r"1 of 2 .*\n.*line 2\b.*'text'.*file_name",
        ),
        (jsonl(lines({"file_name": "a.png", "text": None})), {}, r"line 1\b.*caption.*None"),
        (jsonl(lines({"file_name": "a.png", "text": []})), {}, r"line 1\b.*caption.*\[\]"),
        (jsonl(lines({"file_name": "b.png", "text": "x"})), {}, r"b\.png\b.*(exist|found)"),
        (jsonl(lines({"file_name": ["a.png", "a.png"], "text": "x"})), {}, r"line 1\b.*file_name=\['a\.png'"),
        (
            jsonl(lines({"file_name": "a.png", "text": "x", "references": [3]})),
            {},
            r"references=\[3\]",
        ),
        (jsonl("\n"), {}, r"metadata\.jsonl\b.*empty"),
        (
            jsonl(GOOD + '{"file_name": "a.png", "text": "a \\ud800"}'),
            {},
            r"line 2\b.*caption|a\.png\b.*caption",
        ),
        (jsonl(GOOD + '{"file_name": "\\ud800", "text": "a"}'), {}, r"line 2\b.*file_name="),
        (jsonl(lines({"file_name": "", "text": "x"})), {}, r"line 1\b.*file_name=''"),
        (jsonl(lines({"file_name": "y" * 5000, "text": "x"})), {}, r"/y+\.\.\.y{57}.*too long"),
        (jsonl(lines({"file_name": "../b.png", "text": "x"})), {}, r"line 1\b.*'\.\./b\.png'.* /"),
        (jsonl(lines({"file_name": "/b.png", "text": "x"})), {}, r"line 1\b.*'/b\.png'.* /"),
        (jsonl(lines({"file_name": ".", "text": "x"})), {}, r"line 1\b.*'\.'.* /"),
        (
            jsonl(lines({"file_name": "a.png", "text": "x", "references": ["s/../../b.png"]})),
            {},
            r"line 1\b.*'s/\.\./\.\./b\.png'.* /",
        ),
        (csv("file_name,text\na.png,one, two\n"), {}, r"metadata\.csv line 2\b.*columns"),
        (csv("file_name,text\na.png\n"), {}, r"metadata\.csv line 2\b.*caption.*None"),
        (csv('file_name,text\na.png,"x'), {}, r"metadata\.csv line 1\b.*CSV.*unexpected end of data"),
        (csv("file_name,text\n"), {}, r"metadata\.csv\b.*empty"),
        (csv("img,text\na.png,x\n"), {}, r"metadata\.csv\b.*'file_name'.* img, text"),
        (dangling("a.png"), {}, r"a\.png\b.*(exist|found)"),
        (dangling("a.txt"), {}, r"a\.png\b.*caption.*No such file"),
        (jsonl(GOOD), {"reference_columns": "before"}, "reference_columns='before'.*list"),
        (jsonl(GOOD), {"reference_columns": [3]}, r"reference_columns=3\b"),
        (jsonl(GOOD), {"caption_column": 5}, r"caption_column=5\b"),
        (jsonl(GOOD), {"image_column": ""}, "image_column=''"),
        (jsonl(GOOD), {"prompt": ""}, "prompt=''"),
        (jsonl(GOOD), {"recursive": 1}, "recursive=1"),
        (jsonl(GOOD), {"mask": 1}, r"mask=1\b"),
        (lambda _: None, {}, r"dataset\.path=None\b"),
    ],
)
def test_a_mistake_in_a_folder_is_one_clear_error(
    tmp_path: Path, prepare: Callable, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Folder(prepare(tmp_path), **arguments)


# --- pairs


def pair(folder: Path) -> Path:
    write(folder, {"target/a.png": square("red"), "target/a.txt": "make it red", "source/a.jpg": square(kind="JPEG")})
    return write(folder, {"target/in/b.png": square("lime"), "target/in/b.txt": "green", "source/in/b.png": square()})


def test_pairs_are_of_the_same_name_in_two_folders(tmp_path: Path) -> None:
    samples = Pairs(pair(tmp_path))
    assert names(samples) == ["target/a.png", "target/in/b.png"]
    assert captions(samples) == ["make it red", "green"]
    references = [[str(Path(p.name).relative_to(tmp_path)) for p in sample.references] for sample in samples]
    assert references == [["source/a.jpg"], ["source/in/b.png"]]
    assert captions(Pairs(tmp_path, prompt="color it")) == ["color it"] * 2


def test_several_reference_folders_keep_their_order_and_may_lack_a_picture_if_that_is_said(tmp_path: Path) -> None:
    write(pair(tmp_path), {"pose/a.png": square("blue"), "face/a.png": square("white")})
    folders = ["pose", "source", "face"]
    with pytest.raises(BadData, match=r"1 of 2 .*\n.*b\.png\b.*/pose\b.*dataset\.incomplete"):
        Pairs(tmp_path, reference_folders=folders)
    samples = Pairs(tmp_path, reference_folders=folders, incomplete=True)
    assert [len(sample.references) for sample in samples] == [3, 1]
    assert [color(picture)[2] > 200 for picture in samples[0].references] == [True, False, True]


def test_pairs_may_have_masks(tmp_path: Path) -> None:
    write(pair(tmp_path), {"mask/a.png": square("white"), "mask/in/b.png": square("black")})
    assert [color(sample.mask) for sample in Pairs(tmp_path, mask="mask")] == [WHITE, BLACK]


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({"source/c.png": square()}, {}, r"source/c\.png\b.*/target\b"),
        ({"target/c.png": square(), "target/c.txt": "c"}, {}, r"target/c\.png\b.*/source\b"),
        (
            {"target/c.png": square(), "source/c.png": square()},
            {},
            r"target/c\.png\b.*caption.*\bc\.txt\b",
        ),
        ({"source/a.png": square()}, {}, r"target/a\.png\b.*/source/a\..*/source/a\."),
        ({"target/a.jpg": square()}, {}, r"target/a\..*/target/a\."),
        ({"target/a.txt": b"\xff"}, {}, r"target/a\.png\b.*caption.*UTF-8"),
        ({"source/c.heic": b"", "target/c.png": square(), "target/c.txt": "c"}, {}, r"c\.heic\b.*Pillow"),
        ({}, {"target_folder": "after"}, r"dataset\.target_folder='.*after'"),
        ({}, {"reference_folders": ["before"]}, r"dataset\.reference_folders='.*before'"),
        ({}, {"reference_folders": []}, r"dataset\.reference_folders\b.*empty"),
        ({}, {"reference_folders": "source"}, "reference_folders='source'.*list"),
        ({}, {"mask": "masks"}, r"dataset\.mask='.*masks'"),
        ({"masks/a.png": square()}, {"mask": "masks"}, r"in/b\.png\b.*/masks\b"),
        ({}, {"incomplete": "no"}, "incomplete='no'"),
        ({"none/x.txt": ""}, {"target_folder": "none"}, r"/none\b"),
    ],
)
def test_a_mistake_in_paired_folders_is_one_clear_error(
    tmp_path: Path, files: dict, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Pairs(write(pair(tmp_path), files), **arguments)
