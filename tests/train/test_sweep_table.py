"""Sweeps: the table of jobs, of those that stop or are killed too, and what is said at the end."""

import csv
import json
import signal
import statistics
from html import unescape

import pytest
from message_helpers import holds
from sweep_helpers import LOOKS, same_runs
from train_helpers import adapter, ask_to_stop, same_tensors, values

import train.utils.lock
from train import sweep
from train.sweeps import records
from train.sweeps.table import arrange, render_page

pytest_plugins = ("train_helpers", "sweep_helpers")


@pytest.mark.slow
def test_the_table_is_what_the_jobs_logged(grid, tmp_path):
    code, out, err = grid("adapter.rank=0,4", "optimizer.lr=1e-3,1e-2", "steps=12", *LOOKS)
    assert code == 2, err
    place = tmp_path / "sweep"
    about = json.loads((place / "sweep.json").read_text())
    assert [job["status"] for job in about["jobs"]] == ["failed", "failed", "done", "done"]
    assert about["common"]["steps"] == "12"
    for job in about["jobs"]:
        folder = place / job["folder"]
        if job["status"] == "failed":
            assert "adapter.rank=0" in job["error"]
            assert job["validation_loss"] is None
            continue
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        measured = {line["step"]: line["validation_loss"] for line in logged if "validation_loss" in line}
        assert job["validation_loss"] == measured[12]
        assert job["best_validation_loss"] == min(measured.values())
        assert measured[job["best_step"]] == min(measured.values())
        losses = [line["loss"] for line in logged if "loss" in line]
        assert len(losses) == 12
        assert job["training_loss"] == pytest.approx(statistics.fmean(losses[2:]))
        speeds = [line["images_per_second"] for line in logged if "images_per_second" in line]
        assert job["images_per_second"] == statistics.median(speeds)
        assert job["sheet"] == f"{job['job']}/samples/step_000012.png"
        assert (job["steps"], job["of"]) == (12, 12)
    done = [job for job in about["jobs"] if job["status"] == "done"]
    best = min(done, key=lambda job: job["validation_loss"])
    assert about["best"] == best["job"]
    with (place / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["adapter.rank"] for row in rows] == ["0", "0", "4", "4"]
    assert [row["validation_loss"] for row in rows if row["status"] == "done"] == [
        str(job["validation_loss"]) for job in done
    ]
    shown = next(line for line in out.splitlines() if line.startswith(f"{best['job']} * "))
    assert f"{best['validation_loss']:.4f}" in shown
    page = (place / "sweep.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 1 + 2  # before training, and each job that was done
    places = [page.index(f">job {number}</a>") for number in (0, 2, 1, 3)]
    assert places == sorted(places)  # a row for each rate, a column for each rank, that of failed jobs too
    assert page.count('style="--columns: 2"') == 2
    assert "<ol><li>a red cup</li></ol>" in page
    assert "://" not in page
    assert "<script" not in page
    assert all(f"{job['validation_loss']:.4f}" in page for job in done)
    assert about["jobs"][0]["error"] in unescape(page)
    assert all((place / str(number)).is_dir() and f'href="{number}/"' in page for number in range(4))


@pytest.mark.slow
def test_a_stop_request_leaves_the_table_and_says_how_to_go_on(grid, train, at_step, tmp_path, loads):
    place = tmp_path / "sweep"
    at_step(1, ask_to_stop(signal.SIGINT))
    settings = ["adapter.rank=2,4", "checkpoint_every=2", "resume=auto"]
    code, out, err = grid(*settings)
    assert code == 130
    assert f"output_dir={place} resume=auto" in err
    (job,) = json.loads((place / "sweep.json").read_text())["jobs"]
    assert (job["status"], job["steps"], job["of"]) == ("stopped", 2, 4)
    assert "stopped 2/4" in out
    del loads[:]
    code, out, err = grid(*settings)
    assert code == 0, err
    assert str(place / "0" / "checkpoints" / "step_000002") in out
    same_runs(place / "0", train("alone", "adapter.rank=2"))
    before = adapter(place / "1")
    del loads[:]
    code, out, err = grid(*settings)  # all is done
    assert code == 0, err
    assert out.count("done before") == 2
    assert loads == []
    assert same_tensors(adapter(place / "1"), before)
    assert "lowest validation loss" not in out  # there is none to compare
    code, out, err = grid(*settings, "steps=6")  # for longer
    assert code == 0, err
    assert "done before" not in out
    assert [len(values(place / str(number))) for number in (0, 1)] == [6, 6]
    assert [job["steps"] for job in json.loads((place / "sweep.json").read_text())["jobs"]] == [6, 6]


@pytest.mark.slow
def test_a_finished_job_is_not_taken_for_one_of_other_settings(grid):
    assert grid("adapter.rank=2,4", "steps=1")[0] == 0
    code, _, err = grid("adapter.rank=2,8", "steps=1", "resume=auto")
    assert code == 2
    assert err.count("error: ") == 1
    assert holds(err, "adapter.rank=4 ... 8")


def test_a_job_that_was_killed_has_no_word_and_one_that_holds_its_folder_runs(tmp_path):
    for number in (0, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        records.note(folder, status=records.RUNNING, overrides=["a=1"], steps=4)
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    lock = train.utils.lock.Lock(tmp_path / "1")
    try:
        killed, running = records.read_jobs(tmp_path)
    finally:
        lock.release()
    assert (killed.status, running.status) == ("lost", "running")
    assert (killed.steps, killed.total_steps, killed.training_loss) == (1, 4, 2.0)


def test_the_table_is_made_again_by_a_command(tmp_path, capsys):
    folder = tmp_path / "sweep" / "0"
    folder.mkdir(parents=True)
    records.note(folder, status="done", overrides=["adapter.rank=2", "x=<b>"], steps=1)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "validation_loss": NaN}\n')
    assert sweep.main([str(tmp_path / "sweep")]) == 0
    assert "2.0000" in capsys.readouterr().out
    assert "&lt;b&gt;" in (tmp_path / "sweep" / "sweep.html").read_text()
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"][0]["validation_loss"] is None
    assert sweep.main([str(tmp_path / "gone")]) == 2
    assert holds(capsys.readouterr().err, f"{tmp_path / 'gone'} ... sweep")


@pytest.mark.parametrize(
    ("values", "order", "columns"),
    [
        ([("2", "a"), ("2", "b"), ("4", "a"), ("4", "b"), ("8", "a"), ("8", "b")], [0, 2, 4, 1, 3, 5], 3),
        ([("2", "a"), ("2", "b"), ("2", "c"), ("4", "a"), ("4", "b"), ("4", "c")], [0, 1, 2, 3, 4, 5], 3),
        ([(str(number), "a") for number in range(7)], [*range(7)], 3),  # too many for a row
        ([("2", "a"), ("4", "b"), ("8", "a"), ("16", "b"), ("2", "b")], [*range(5)], 3),  # a search, and no grid
        ([("2", "a"), ("4", "a"), ("8", "a"), ("16", "a")], [*range(4)], 4),
        ([("2", "a")], [0], 1),
    ],
)
def test_jobs_of_a_grid_stand_in_rows_that_differ_in_one_key(values, order, columns, tmp_path):
    found = [records.SweepJob(i, tmp_path / str(i), {"rank": rank, "lr": lr}) for i, (rank, lr) in enumerate(values)]
    shown, count = arrange(found, records.split_overrides(found)[1])
    assert ([job.number for job in shown], count) == (order, columns)


def test_a_sample_grid_that_cannot_be_read_is_left_out(tmp_path):
    broken = tmp_path / "0" / "step_000001.png"
    broken.parent.mkdir()
    broken.write_bytes(b"\x89PNG half")
    page = render_page(tmp_path, [records.SweepJob(0, broken.parent, sheet=broken)])
    assert "<figure" in page
    assert "<img" not in page


@pytest.mark.slow
def test_a_sweep_says_where_things_are_as_a_single_run_does_and_recommends_once(
    run_command, small, tmp_path, monkeypatch
):
    """Of its best job, and at its end; the folders lie in the current one, and are said from there."""
    monkeypatch.chdir(tmp_path)
    looks = ["steps=2", "validate_every=1", "checkpoint_every=1", "validation.held_out=2"]
    code, out, err = run_command("-m", *small("output_dir=many", "adapter.rank=2,4", *looks))
    assert code == 0, err
    assert "adapter   many/0/adapter" in out
    assert "numbers   many/1/metrics.jsonl" in out
    assert "table     many/sweep.html" in out
    assert str(tmp_path / "many") not in out
    best = json.loads((tmp_path / "many" / "sweep.json").read_text())["best"]
    assert out.count("recommended, on 2 samples and ") == 1
    assert out.index("lowest validation loss") < out.index(f"of job {best}") < out.index("recommended")
    assert f"alone, many/{best}/checkpoints/step_" in out
    code, out, err = run_command(*small("output_dir=one", *looks))
    assert code == 0, err
    assert "adapter   one/adapter" in out
    assert "alone, one/checkpoints/step_" in out
