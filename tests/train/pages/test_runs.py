"""The pages of runs: what each shows, whatever is in the folder."""

import json
import re
import shutil
import sys
from html import unescape
from io import BytesIO

import pytest
from PIL import Image
from run_folders import PROMPTS, color_of, logged_run
from studio_helpers import part, words

from flux2.adapters.files import UNFINISHED_FILE
from train.pages import run_files, runs
from train.reports import run_report
from train.utils.lock import Lock
from train.utils.text import setting

pytest_plugins = ("studio_helpers",)


@pytest.fixture
def page(studio_page):
    return studio_page()


@pytest.fixture
def folder(page):
    return page.known.workspace.outputs / "cards" / "run"


def everything(page, run):
    return "".join(part(page, run, name) for name in runs.PARTS)


def test_the_table_has_a_line_for_each_run_with_its_state_and_numbers(page, folder):
    logged_run(folder, 0, 10, 20)
    done = logged_run(folder.with_name("done"), 0, 10, 40, finished=True)
    first = words(page.get("/runs/live").text)
    assert "cards/run stopped 20 of 40 0.8000 1.2500" in first
    assert "cards/done finished 40 of 40 0.6000 0.8500" in first
    lock = Lock(folder)
    (done / UNFINISHED_FILE).touch()
    later = words(page.get("/runs/live").text)
    assert "cards/run running" in later
    assert "cards/done stopped" in later
    lock.release()
    assert "cards/run stopped" in words(page.get("/runs/live").text)


def test_a_run_is_read_again_only_when_its_files_changed(page, folder, monkeypatch):
    run, reads = logged_run(folder, 0, 10), []
    read = run_files.read_metrics
    monkeypatch.setattr(run_files, "read_metrics", lambda place: reads.append(place) or read(place))
    for _ in range(3):
        assert "10 of 40" in words(page.get("/runs/live").text)
    assert len(reads) == 1
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, "loss": 0.5}) + "\n")
    assert "12 of 40 0.5000" in words(page.get("/runs/live").text)
    assert len(reads) == 2


def test_a_slow_read_is_repeated_a_tenth_of_the_time(folder, monkeypatch):
    now, reads = [0.0], []
    monkeypatch.setattr(run_files.time, "monotonic", lambda: now[0])

    def read(place):
        reads.append(place)
        now[0] += 3
        return len(reads)

    kept = run_files.KeptReads(read, most=2)
    assert [kept.get(folder, "a"), kept.get(folder, "b")] == [1, 1]
    now[0] = 29
    assert kept.get(folder, "b") == 1
    now[0] = 31
    assert [kept.get(folder, "b"), kept.get(folder, "b")] == [2, 2]
    for name in ("one", "two"):
        kept.get(folder / name, "a")
    assert kept.get(folder, "b") == 5  # only two are kept


def test_a_run_shows_how_far_it_is_and_how_long_it_takes(page, folder):
    run = logged_run(folder, 0, 10, 20, memory={"checkpointing": "full", "gpu_memory_gb": 24.0, "offload_blocks": 8})
    assert "time left" not in part(page, run, "now")
    lock = Lock(run)
    text = words(part(page, run, "now"))
    assert "running steps 20 of 40 time left about 10 s, without" in text  # 20 steps of 4 images at 8 images/s
    assert "speed 8 images/s loss 0.8 validation loss 1.25 peak memory 1.50 GB memory was chosen for 24 GB" in text
    assert "memory.checkpointing=full memory.offload_blocks=8" in text
    lock.release()


def test_the_number_of_images_is_that_of_the_settings_without_a_checkpoint(folder):
    run = logged_run(folder, 0, batch_size=3, gradient_accumulation=2)
    config = run_files.configuration(run)
    assert run_files.images_per_step(run, config, "python train/run.py") == 6
    assert run_files.images_per_step(run, config, "accelerate launch --num_processes 4 train/run.py") == 24
    assert run_files.images_per_step(run, {**config, "batch_size": "auto"}, "") is None


def test_a_run_shows_curves_recommendation_problems_and_commands(page, folder):
    run = logged_run(folder, 0, 10, 20)
    charts = part(page, run, "charts")
    assert [found for found in ("Training loss", "Validation loss", "Learning rate") if found in charts]
    assert len(re.findall("data-chart='", charts)) == 4
    assert json.loads(unescape(re.findall("data-chart='([^']*)'", charts)[1]))["series"][0]["steps"] == [0, 10, 20]
    assert "step_000020: the last one has the lowest validation loss" in words(part(page, run, "verdict"))
    assert "What stands out" not in part(page, run, "verdict")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "skipped": 1}\n')
    assert "1 logged steps made no update" in words(part(page, run, "verdict"))
    whole = page.get("/runs/one", params={"folder": str(run)}).text
    assert "data-copy>python train/run.py +experiment=tarot" in whole
    assert "<h1>cards/run</h1>" in whole


def test_the_first_batch_is_shown_once_it_is_written(studio_page, tmp_path):
    page = studio_page(known=lambda command: True)
    folder = page.known.workspace.outputs / "cards" / "run"
    run = logged_run(folder, 0)
    assert part(page, run, "batch").strip() == ""
    Image.new("RGB", (40, 20), "red").save(run / "first_batch.png")
    address = unescape(re.search(r'<img src="([^"]*)"', part(page, run, "batch"))[1])
    answer = page.get(address)
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(BytesIO(answer.content)).getpixel((5, 5)) == (255, 0, 0)
    job = page.known.queue.add("train", [sys.executable, "-c", ""], folder=run)  # whose page is there before the run's
    assert address in unescape(page.get(f"/jobs/{job.number}/live").text)
    (run / "first_batch.png").rename(tmp_path / "elsewhere.png")
    (run / "first_batch.png").symlink_to(tmp_path / "elsewhere.png")
    assert page.get(address).status_code == 403


def test_sample_grids_are_compared_over_the_steps_from_addresses(page, folder):
    run = logged_run(folder, 0, 10, 20)
    text = part(page, run, "pictures")
    assert "data:" not in text
    assert re.findall(r'data-name="([^"]*)"', text) == ["base", "step 10", "step 20"] * 2
    addresses = [unescape(address) for address in re.findall(r'src="([^"]*)"', text)]
    assert len(addresses) == 6
    answer = page.get(addresses[5])  # the last step of the second prompt
    assert answer.headers["content-type"] == "image/png"
    assert "max-age" in answer.headers["cache-control"]
    image = Image.open(BytesIO(answer.content))
    assert image.getpixel((5, 5)) == color_of(20, 1)
    assert f'width="{image.width}" height="{image.height}"' in text
    wrong = {"folder": str(run), "step": 20, "place": len(PROMPTS)}
    assert page.get("/runs/cell", params=wrong).status_code == 400
    assert page.get("/runs/cell", params={**wrong, "step": 30}).status_code == 400
    (run / "samples" / "step_000020.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    assert re.findall(r'data-name="([^"]*)"', part(page, run, "pictures")) == ["base", "step 10"] * 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "lo', ""),
        ("metrics.jsonl", '{"step": "x"}\n[1]\n\xff\x00\n{"step": 1, "loss": "<b>1</b>"}\n', ""),
        ("validation.jsonl", '{"step": 0, "losses": [[1]], "samples": []}\n', "validation.jsonl"),
        ("config.yaml", "steps: [", "config.yaml"),
        ("config.yaml", "name: a\nsteps: 40\ntarget: x\nmemory: 3\nsample: []\nvalidation: 1\n", "AttributeError"),
    ],
)
def test_a_damaged_file_is_at_most_one_message_and_all_else_is_shown(page, folder, name, content, said):
    run = logged_run(folder, 0, 10)
    (run / name).write_text(content, encoding="latin-1")
    text = everything(page, run)
    verdict = part(page, run, "verdict")
    assert verdict.count("<li>") == bool(said)
    assert said in verdict
    assert "<b>1</b>" not in text
    assert 'data-name="step 10"' in text
    assert page.get("/runs/one", params={"folder": str(run)}).status_code == 200
    assert "cards/run" in page.get("/runs/live").text or name == "config.yaml"


def test_a_folder_that_disappears_is_one_message(page, folder):
    run = logged_run(folder, 0, 10)
    assert "10 of 40" in everything(page, run)
    shutil.rmtree(run)
    assert everything(page, run).count("is no run folder, or no longer") == 1
    assert "There is no run" in page.get("/runs/live").text
    assert page.get("/runs/one", params={"folder": str(run)}).status_code == 400
    assert page.submit("/runs/stop", folder=str(run))["status"] == 400


def test_a_run_outside_of_the_opened_folders_is_not_read(page, tmp_path):
    run = logged_run(tmp_path / "secret", 0, 10)
    for path in ("/runs/one", "/runs/part", "/runs/report", "/runs/cell"):
        answer = page.get(path, params={"folder": str(run), "name": "now", "step": 10, "place": 0})
        assert answer.status_code == 403
    for path in ("/runs/stop", "/runs/sample", "/runs/resume"):
        assert page.submit(path, folder=str(run))["status"] == 403
    assert not (run / "sample").exists()
    (page.known.workspace.outputs / "own" / "samples").mkdir(parents=True)
    (page.known.workspace.outputs / "own" / "samples" / "step_000010.png").symlink_to(run / "samples/step_000010.png")
    own = page.known.workspace.outputs / "own"
    (own / "config.yaml").write_text("steps: 1\n")
    assert page.get("/runs/cell", params={"folder": str(own), "step": 10, "place": 0}).status_code == 403
    assert page.get("/runs/part", params={"folder": str(own), "name": "pictures"}).status_code == 403


def test_names_and_commands_of_a_run_are_shown_as_text_without_secrets(page, folder):
    evil = "<img src=x onerror=alert(1)>"
    run = logged_run(folder, 0, 10, name=evil, tracker={"api_key": "abcdefgh12345678"})
    (run / "command.txt").write_text(f"python train/run.py name='{evil}' hf_token=hf_{'Qz7' * 11}\n")
    text = page.get("/runs/live").text + everything(page, run)
    text += page.get("/runs/one", params={"folder": str(run)}).text
    (run / "validation.jsonl").write_text('{"step": 0, "losses": [[1]], "samples": []}')  # no summary can be made
    text += page.get("/runs/one", params={"folder": str(run)}).text
    assert text.count("api_key") == 2
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text
    assert "hf_Qz7" not in text
    assert "abcdefgh12345678" not in text


def test_a_report_gets_no_origin(page, folder):
    run = logged_run(folder, 0, 10)
    assert page.get("/runs/report", params={"folder": str(run)}).status_code == 400
    assert "/runs/report" not in part(page, run, "now")
    run_report.write(run)
    answer = page.get("/runs/report", params={"folder": str(run)})
    assert answer.headers["content-security-policy"] == (
        "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'"
    )
    assert answer.content == (run / "report.html").read_bytes()
    assert "/runs/report" in part(page, run, "now")  # also in a page that was opened while it trained


def test_paths_and_prompts_become_settings_that_hydra_reads_back():
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    paths = ["outputs/a/2026-01-01_10-00-00", "../a", "a b", "x,y", "1", "a=b", "a\\"]
    for text in [*paths, 'it\'s "q"', "true", "null", "${oc.env:HOME}", "1_000", "inf"]:
        parsed = OverridesParser.create().parse_override(setting("run", text))
        assert OmegaConf.create({"run": parsed.value()})["run"] == text
