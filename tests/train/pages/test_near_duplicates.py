"""Images that look alike: copies are found, and what differs is not."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from data.sources.images import file_picture
from train.pages.near_duplicates import LookAlikes, find, groups_of, main, read_look_alikes

DEMO = sorted((Path(__file__).parents[3] / "data/demo").glob("*.png"))


def test_copies_of_an_image_are_found_and_other_images_are_not(tmp_path):
    image = Image.open(DEMO[6]).convert("RGB")
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=40)
    copies = {
        "resized": image.resize((image.width // 2, image.height // 3)),
        "recompressed": Image.open(packed),
        "brighter": ImageEnhance.Brightness(image).enhance(1.05),
    }
    others = {"mirrored": ImageOps.mirror(image), "cropped": image.crop((40, 40, image.width, image.height))}
    for name, one in (copies | others).items():
        one.save(tmp_path / f"{name}.png")
    pictures = [file_picture(path) for path in (*DEMO, *(tmp_path / f"{name}.png" for name in copies | others))]
    assert find(pictures).groups == [[str(DEMO[6]), *(str(tmp_path / f"{name}.png") for name in copies)]]


def test_plain_images_are_alike_only_if_they_have_one_color(tmp_path):
    for name, color in (("a", (200, 200, 200)), ("b", (201, 200, 200)), ("c", (190, 200, 200))):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{name}.png")
    found = find([file_picture(tmp_path / f"{name}.png") for name in "abc"])
    assert found.groups == [[str(tmp_path / "a.png"), str(tmp_path / "b.png")]]


def test_groups_are_the_same_as_of_each_pair_by_itself():
    random = np.random.default_rng(0)
    firsts = random.uniform(0, 255, (40, 768)).astype(np.float32)
    prints = firsts[random.integers(0, 40, 700)] + random.normal(0, 1, (700, 768)).astype(np.float32)
    found = list(groups_of(prints))
    wanted: dict[int, list[int]] = {}
    for i, one in enumerate(prints):
        same = next((j for j in wanted if np.sqrt(((prints[j] - one) ** 2).mean()) < 10), i)
        wanted.setdefault(same, []).append(i)
    assert sorted(found) == sorted(group for group in wanted.values() if len(group) > 1)


def test_an_image_that_cannot_be_read_is_left_out(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    found = find([file_picture(tmp_path / "broken.png"), file_picture(DEMO[6])])
    assert list(found.stamps) == [str(DEMO[6])]
    assert "broken.png cannot be read" in capsys.readouterr().err


def test_only_files_that_are_as_they_were_compared_are_marked(tmp_path):
    for name in "abc":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    pictures = [file_picture(tmp_path / f"{name}.png") for name in "abc"]
    found = find(pictures)
    names = [picture.name for picture in pictures]
    assert found.group_of(pictures) == (dict.fromkeys(names, 1), 0)
    (tmp_path / "a.png").unlink()
    assert found.group_of(pictures) == (dict.fromkeys(names[1:], 1), 1)
    Image.new("RGB", (33, 32)).save(tmp_path / "b.png")
    assert found.group_of(pictures) == ({}, 2)


def test_the_command_writes_what_the_page_reads(tmp_path, capsys):
    for i in range(3):
        Image.new("RGB", (32, 32), (90 * (i // 2), 0, 0)).save(tmp_path / f"{i}.png")
    file = tmp_path / "new/found.json"
    assert main(["--into", str(file), "--path", str(tmp_path)]) == 0
    assert "3 images compared: 2 look alike, in 1 group" in capsys.readouterr().out
    found = read_look_alikes(file)
    assert found is not None
    assert found.groups == [[str(tmp_path / "0.png"), str(tmp_path / "1.png")]]
    assert main(["--into", str(file), "--path", str(tmp_path / "none")]) == 2
    assert "error: dataset.path=" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"groups": 1, "stamps": {}}', '{"groups": [[1]], "stamps": {}}'])
def test_a_file_that_is_not_of_a_search_is_none(tmp_path, content):
    file = tmp_path / "found.json"
    assert read_look_alikes(file) is None
    file.write_text(content)
    assert read_look_alikes(file) is None
    file.write_text(json.dumps({"groups": [["a", "b"]], "stamps": {"a": "1"}}))
    assert read_look_alikes(file) == LookAlikes([["a", "b"]], {"a": "1"})
