"""train/caption.py: images without captions get one, whatever is there stays, and an interrupted start resumes."""

import json
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from message_helpers import holds
from PIL import Image
from remote_helpers import SECRET
from train_helpers import CONF, draw_picture, values

from data.sources import Folder, Pairs
from data.synthetic.captions import plain_caption, plain_edit
from data.synthetic.drawings import Drawing, all_drawings, draw
from data.synthetic.recognize import recognize
from flux2.prompts import captioning
from flux2.prompts.captioning import TEMPLATES
from flux2.prompts.remote_client import TOKEN
from train import caption
from train.caption import main

pytest_plugins = ("train_helpers", "writer_helpers", "serve_helpers")


class Recognizer:
    """The exact captioner of the embedded model's drawings: it names what it sees. Of a pair, it says the change."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int, str]] = []

    def describe(
        self, images: Sequence[Image.Image], system: str, request: str, *, seed: int, new_tokens: int, name: str
    ) -> str:
        self.asked.append((name, system, seed, request))
        drawings = [found.drawing for found in recognize(images)]
        if len(drawings) == 1:
            return plain_caption(drawings[0])
        before, after = drawings
        (kind,) = [
            key for key in ("shape", "color", "background", "size") if getattr(before, key) != getattr(after, key)
        ]
        return plain_edit(before, kind, getattr(after, kind))[0]


@pytest.fixture
def recognizer(monkeypatch: pytest.MonkeyPatch) -> Recognizer:
    """In place of the model that would be loaded."""
    made = Recognizer()
    monkeypatch.setattr(caption, "load_caption_model", lambda *_: made)
    return made


@pytest.fixture
def run(run_command: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """`run("dataset.path=...")`: (exit code, standard output, errors) of the command."""
    return lambda *words: run_command("device=cpu", *words, task=main, name="caption")


@pytest.fixture
def refused(run_command) -> Callable[..., str]:
    return lambda *words: run_command.refused("device=cpu", *words, task=main, name="caption")


def drawings(folder: Path, count: int = 4) -> dict[str, Drawing]:
    """Save drawings without captions; their names, and what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {f"{i}": one for i, one in enumerate(random.Random(0).sample(all_drawings(), count))}
    for name, one in chosen.items():
        draw(one).save(folder / f"{name}.png")
    return chosen


def contents(folder: Path) -> dict[str, str]:
    return {file.stem: file.read_text() for file in sorted(folder.rglob("*.txt"))}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ------------------------------------------------------------------ the whole way, with a model that sees


def test_dev_writes_captions_and_an_interrupted_start_resumes_to_the_same(
    run, writer_source, tmp_path, monkeypatch
) -> None:
    for name in ("whole", "other", "parts"):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(4):
            draw_picture(i, (32, 24)).save(folder / f"{i}.png")
        (folder / "3.txt").write_text("what I wrote myself")
    words = [f"caption.model={writer_source.path}", "caption.new_tokens=40"]

    code, out, _ = run(f"dataset.path={tmp_path / 'whole'}", *words)
    assert code == 0
    assert "3 captions" in out
    wanted = contents(tmp_path / "whole")
    assert wanted["3"] == "what I wrote myself"
    assert all(wanted[f"{i}"].strip() for i in range(3))
    assert len(set(wanted.values())) == 4

    assert run(f"dataset.path={tmp_path / 'other'}", "seed=1", *words)[0] == 0
    assert contents(tmp_path / "other") != wanted

    describe, calls = captioning.load_upsampler, []

    def stopping(*arguments, **more):
        model = describe(*arguments, **more)
        answer = model.describe

        def counted(*images, name, **settings):
            calls.append(Path(name).stem)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return answer(*images, name=name, **settings)

        model.describe = counted
        return model

    monkeypatch.setattr(captioning, "load_upsampler", stopping)
    code, _, err = run(f"dataset.path={tmp_path / 'parts'}", *words)
    assert code == 130, err
    assert contents(tmp_path / "parts") == {name: wanted[name] for name in ("0", "3")}
    assert run(f"dataset.path={tmp_path / 'parts'}", *words)[0] == 0
    assert calls == ["0", "1", "1", "2"]
    assert snapshot(tmp_path / "parts") == snapshot(tmp_path / "whole")


# ------------------------------------------------------------------ what is written where, with one that is exact


def test_the_exact_captioners_captions_train_a_run(run, recognizer, train, tmp_path) -> None:
    folder = tmp_path / "drawings"
    shown = drawings(folder)
    assert run("dataset=folder", f"dataset.path={folder}", "caption.template=style", "seed=3")[0] == 0
    assert contents(folder) == {name: f"{plain_caption(one)}\n" for name, one in shown.items()}
    assert {request[1:] for request in recognizer.asked} == {(TEMPLATES["style"].system, 3, TEMPLATES["style"].request)}
    assert [sample.caption for sample in Folder(folder)] == [plain_caption(one) for one in shown.values()]
    trained = train("run", f"dataset.path={folder}", "buckets.resolution=48")
    assert len(values(trained)) == 4


def test_captions_that_exist_are_kept_and_then_there_is_nothing_to_do(run, recognizer, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "drawings"
    shown = drawings(folder)
    (folder / "1.txt").write_text("mine", encoding="utf-8")
    before = os.stat(folder / "1.txt").st_mtime_ns
    assert run(f"dataset.path={folder}")[0] == 0
    assert [Path(name).stem for name, *_ in recognizer.asked] == ["0", "2", "3"]
    assert contents(folder) == {name: f"{plain_caption(one)}\n" for name, one in shown.items()} | {"1": "mine"}
    assert os.stat(folder / "1.txt").st_mtime_ns == before
    written = snapshot(folder)
    monkeypatch.setattr(caption, "load", lambda *_: pytest.fail("a model was loaded"))
    code, out, _ = run(f"dataset.path={folder}")
    assert code == 0
    assert "nothing to do" in out
    assert snapshot(folder) == written


def test_subfolders_are_captioned_as_they_are_trained(run, recognizer, tmp_path) -> None:
    drawings(tmp_path / "tree", 1)
    drawings(tmp_path / "tree" / "more", 2)
    assert run(f"dataset.path={tmp_path / 'tree'}")[0] == 0
    assert len(list(tmp_path.rglob("*.txt"))) == 1
    assert run(f"dataset.path={tmp_path / 'tree'}", "dataset.recursive=true")[0] == 0
    assert len(Folder(tmp_path / "tree", recursive=True)) == 3


def test_a_column_of_the_metadata_is_filled_and_its_other_lines_stay(run, recognizer, tmp_path) -> None:
    folder = tmp_path / "described"
    shown = drawings(folder, 5)
    kept = '{"file_name": "1.png",   "text": "mine", "note": "\\u00e9"}'
    rows = ['{"file_name": "0.png", "text": null, "note": "é"}', kept, '{"file_name": "2.png"}', ""]
    rows += ['{"text": "", "file_name": "3.png"}', '{"file_name": "4.png", "text": ["a", "b"]}']
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    assert run(f"dataset.path={folder}")[0] == 0
    lines = (folder / "metadata.jsonl").read_text().split("\n")
    assert (lines[1], lines[3], lines[5]) == (kept, "", rows[5])
    assert lines[0] == json.dumps(
        {"file_name": "0.png", "text": plain_caption(shown["0"]), "note": "é"}, ensure_ascii=False
    )
    assert json.loads(lines[2]) == {"file_name": "2.png", "text": plain_caption(shown["2"])}
    assert [sample.caption for sample in Folder(folder)][3] == plain_caption(shown["3"])
    assert not list(folder.glob("*.txt"))
    assert not list(folder.glob(".*"))
    again = snapshot(folder)
    assert run(f"dataset.path={folder}")[0] == 0
    assert snapshot(folder) == again


def test_the_metadata_may_have_no_captions_and_another_column_yet(run, recognizer, tmp_path) -> None:
    folder = tmp_path / "described"
    drawings(folder, 2)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": "1.png"}\n')
    assert run(f"dataset.path={folder}", "dataset.caption_column=prompt")[0] == 0
    assert len(Folder(folder, caption_column="prompt")) == 2


def test_the_instruction_of_a_pair_is_told_from_both_images_in_order(run, recognizer, tmp_path) -> None:
    before = Drawing("cup", "red", "blue", "small")
    for i, (kind, new) in enumerate([("color", "green"), ("shape", "bell"), ("size", "large")]):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "target").mkdir(exist_ok=True)
        draw(before).save(tmp_path / "source" / f"{i}.png")
        draw(plain_edit(before, kind, new)[1]).save(tmp_path / "target" / f"{i}.png")
    assert run("dataset=pairs", f"dataset.path={tmp_path}", "caption.template=edit")[0] == 0
    assert contents(tmp_path) == {"0": "make it green\n", "1": "turn it into a bell\n", "2": "make it large\n"}
    assert {one[1] for one in recognizer.asked} == {TEMPLATES["edit"].system}
    assert [sample.caption for sample in Pairs(tmp_path)] == ["make it green", "turn it into a bell", "make it large"]


def test_other_templates_show_the_target_alone_and_instructions_are_added(run, recognizer, tmp_path) -> None:
    for name in ("source", "target"):
        drawings(tmp_path / name, 1)
    draw(Drawing("cup", "red", "blue", "small")).save(tmp_path / "target" / "0.png")
    words = ["caption.template=subject", "caption.instructions=Call the cup Anna."]
    assert run("dataset=pairs", f"dataset.path={tmp_path}", *words)[0] == 0
    assert contents(tmp_path) == {"0": plain_caption(Drawing("cup", "red", "blue", "small")) + "\n"}
    assert recognizer.asked[0][1] == f"{TEMPLATES['subject'].system}\nCall the cup Anna."


def test_an_answer_becomes_one_line(run, recognizer, tmp_path, monkeypatch) -> None:
    drawings(tmp_path, 1)
    monkeypatch.setattr(recognizer, "describe", lambda *_, **__: " a cup,\n\n  on a table\t")
    assert run(f"dataset.path={tmp_path}", "dataset.captions.split_lines=true")[0] == 0
    assert contents(tmp_path) == {"0": "a cup, on a table\n"}


def test_a_server_captions_and_one_that_refuses_ends_the_command(
    running, run_command, recognizer, tmp_path, monkeypatch
) -> None:
    shown = drawings(tmp_path, 3)
    monkeypatch.delenv(TOKEN, raising=False)
    words = [f"dataset.path={tmp_path}", f"caption.model={running(token=SECRET, captioner=recognizer).url}"]
    assert holds(run_command.refused(*words, task=main, name="caption"), f"token is required ... {TOKEN}")
    assert contents(tmp_path) == {}
    monkeypatch.setenv(TOKEN, SECRET)
    for word, said in (
        ("device=cpu", "device=cpu ... no effect with a server"),
        ("caption.storage=nf4", "caption.storage ... no effect with a server ... --storage"),
        ("caption.dtype=bf16", "caption.dtype ... no effect with a server"),
    ):
        assert holds(run_command.refused(*words, word, task=main, name="caption"), said)
    assert run_command(*words, task=main, name="caption")[0] == 0
    assert contents(tmp_path) == {name: f"{plain_caption(one)}\n" for name, one in shown.items()}


# ------------------------------------------------------------------ what goes wrong


def test_what_is_written_meanwhile_is_kept(run, recognizer, tmp_path, monkeypatch) -> None:
    drawings(tmp_path / "files", 2)
    drawings(tmp_path / "rows", 2)
    metadata = tmp_path / "rows" / "metadata.jsonl"
    metadata.write_text('{"file_name": "0.png"}\n{"file_name": "1.png"}\n')
    edited = '{"file_name": "0.png", "text": "mine"}'

    def edit(*_, name, **__):
        if name.endswith("files/0.png"):
            (tmp_path / "files" / "0.txt").write_text("mine")
        if name.endswith("rows/0.png"):
            metadata.write_text(f'{edited}\n{{"file_name": "1.png"}}\n')
        return "a model's"

    monkeypatch.setattr(recognizer, "describe", edit)
    for name in ("files", "rows"):
        code, _, err = run(f"dataset.path={tmp_path / name}")
        assert code == 2
        assert re.search(r"warning: .*0\.png got no caption.*meanwhile", err)
        assert re.search("error: 1 image of 2 got no caption", err)
    assert contents(tmp_path / "files") == {"0": "mine", "1": "a model's\n"}
    assert metadata.read_text() == f'{edited}\n{{"file_name": "1.png", "text": "a model\'s"}}\n'


def test_an_image_that_fails_does_not_stop_the_others(run, recognizer, tmp_path, monkeypatch) -> None:
    drawings(tmp_path, 3)
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[: len(content) // 2])
    code, _, err = run(f"dataset.path={tmp_path}")
    assert code == 2
    assert "1.png" in err
    assert sorted(contents(tmp_path)) == ["0", "2"]
    (tmp_path / "1.png").write_bytes(content)
    assert run(f"dataset.path={tmp_path}")[0] == 0
    assert sorted(contents(tmp_path)) == ["0", "1", "2"]


def test_a_full_disk_ends_the_command(refused, recognizer, tmp_path, monkeypatch) -> None:
    drawings(tmp_path, 2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", lambda self, *_, **__: full() if ".part" in self.name else None)
    assert holds(refused(f"dataset.path={tmp_path}"), "0.txt ... no space left ... room")
    assert len(recognizer.asked) == 1
    assert contents(tmp_path) == {}


def test_out_of_memory_names_what_needs_less(refused, recognizer, tmp_path, monkeypatch) -> None:
    drawings(tmp_path, 2)

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(recognizer, "describe", too_large)
    assert holds(refused(f"dataset.path={tmp_path}"), "out of GPU memory ... caption.storage=nf4 ... caption.model")


def test_a_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(refused, tmp_path, monkeypatch) -> None:
    drawings(tmp_path, 1)
    monkeypatch.setattr(caption, "load", lambda *_: pytest.fail("a model was loaded"))

    def read_only(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", read_only)
    assert holds(
        refused(f"dataset.path={tmp_path}"), f"dataset.path={tmp_path} ... permission denied ... another folder"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "dataset.path is missing"),
        (["dataset.path={empty}"], "{empty} has no samples ... contains no images"),
        (["dataset.path={empty}/no"], "dataset.path={empty}/no ... does not exist"),
        (["dataset=huggingface", "dataset.path=x"], "dataset=folder or dataset=pairs"),
        (["dataset.path={images}", "dataset.prompt=a cup"], "dataset.prompt=a cup ... Omit it"),
        (["dataset.path={images}", "dataset.pathh=1"], "dataset.pathh=1 ... dataset.path"),
        (["dataset.path={images}", "+sed=1"], "sed=1 is not a setting ... seed"),
        (["dataset.path={images}", "caption.template=tags"], "caption.template=tags ... style, subject, edit"),
        (["dataset.path={images}", "caption.templates=x"], "caption.templates=x ... caption.template"),
        (["dataset.path={images}", "caption.template=edit"], "0.png has no references ... dataset=pairs"),
        (["dataset.path={images}", "caption.storage=fp8"], "caption.storage=fp8 ... nf4, int8"),
        (["dataset.path={images}", "caption.dtype=fp16"], "caption.dtype=fp16 ... fp32, bf16"),
        (["dataset.path={images}", "caption.new_tokens=0"], "caption.new_tokens=0 ... from 1 to 2048"),
        (["dataset.path={images}", "caption.instructions=' '"], "caption.instructions= ... is empty"),
        (["dataset.path={images}", "caption.model={empty}"], "caption.model={empty} ... neither ... config.json"),
        (["dataset.path={images}", "seed=-1"], "seed=-1 ... integer >= 0"),
        (["dataset.path={table}"], "metadata.csv ... metadata.jsonl"),
        (["dataset.path={images}", "device=tpu"], "device=tpu"),
        (["-m", "seed=0,1", "dataset.path={images}"], "-m ... only training"),
    ],
)
def test_what_cannot_be_captioned_is_one_message(refused, tmp_path, words, said) -> None:
    folders = {name: tmp_path / name for name in ("empty", "images", "table")}
    for folder in folders.values():
        folder.mkdir()
    for name in ("images", "table"):
        drawings(folders[name], 2)
    (folders["table"] / "metadata.csv").write_text("file_name,text\n0.png,\n1.png,a cup\n")
    before = snapshot(tmp_path)
    assert holds(refused(*(word.format(**folders) for word in words)), said.format(**folders))
    assert snapshot(tmp_path) == before


def test_several_processes_are_refused(refused, tmp_path, monkeypatch) -> None:
    drawings(tmp_path, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert holds(refused(f"dataset.path={tmp_path}"), "without a launcher")


def test_masks_and_controls_get_no_captions(run, tmp_path) -> None:
    drawings(tmp_path, 1)
    draw_picture(0, (96, 96)).save(tmp_path / "0_mask.png")
    code, _, err = run(f"dataset.path={tmp_path}")
    assert code == 2
    assert holds(err, "1 of 2 samples ... 0_mask.png has no caption and ... belongs to 0.png")
    assert contents(tmp_path) == {}


def test_every_setting_is_in_its_file() -> None:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("caption", ["dataset.path=x"])
    assert set(config) == {"dataset", "caption", "seed", "device"}
    assert set(config.caption) == set(caption.CaptionSettings.__dataclass_fields__)
    assert config.dataset._target_ in caption.SOURCES
