"""Sweeps: what jobs share and that it changes nothing, what is left of those that fail or stop, and the table."""

import csv
import json
import signal
import statistics
from html import unescape
from pathlib import Path

import pytest
import torch
from message_helpers import holds
from train_helpers import adapter, ask_to_stop, compose, lines, same_tensors, values

import train.run
import train.stages.data
import train.stages.model
import train.utils.lock
from train import sweep
from train.encoding.text_encoders import LocalTextEncoder
from train.stages.memory import load_config
from train.stages.model import load_base
from train.sweeps import records, reuse
from train.sweeps.reuse import SHARED, Base, SharedObjects, checksum, state_of
from train.sweeps.table import arrange, render_page

pytest_plugins = ("train_helpers", "offload_helpers")

USED = "transformer of the previous job"
LOOKS = ["validate_every=2", "sample_every=2", "sample.prompts=[a red cup]", "sample.steps=2"]


@pytest.fixture
def grid(run_command, small, tmp_path):
    """`grid("adapter.rank=2,4", kind="klein")`: a sweep into `tmp_path / "sweep"`; (exit code, output, errors)."""

    def run(*overrides, kind="dev"):
        return run_command("-m", *small(f"output_dir={tmp_path / 'sweep'}", *overrides, kind=kind))

    return run


@pytest.fixture
def loads(monkeypatch):
    """What was loaded, in order."""
    found = []

    def spy(name):
        place = train.stages.data if name == "prepare" else train.stages.model
        load = getattr(place, name)

        def loaded(*arguments, **options):
            found.append(name)
            return load(*arguments, **options)

        monkeypatch.setattr(place, name, loaded)

    spy("load_transformer")
    spy("load_autoencoder")
    return found


def same_runs(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    assert len(lines(one)) >= 3
    assert same_tensors(adapter(one), adapter(other))
    for sheet in (one / "samples").glob("*.png"):
        assert sheet.read_bytes() == (other / "samples" / sheet.name).read_bytes()


# ------------------------------------------------------------------ what jobs share


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (LOOKS, "dev"),
        (["adapter=dora", "adapter.dropout=0.2", *LOOKS], "klein"),
        (["precision=nf4", "memory.checkpointing=selective"], "dev"),
        (["embedding_storage=projected", "cache_dir=null"], "dev"),
        (["memory.offload_blocks=0.5", "memory.offload_activations=true"], "dev"),
    ],
    ids=["samples", "dora", "nf4", "projected", "streaming"],
)
def test_jobs_load_once_and_give_what_they_give_alone(grid, train, loads, tmp_path, settings, kind):
    code, out, err = grid("adapter.rank=2,4", *settings, kind=kind)
    assert code == 0, err
    assert loads.count("load_transformer") == 1
    assert loads.count("load_autoencoder") == ("sample_every=2" in settings)
    assert out.count("loading the transformer") == 1
    assert out.count(USED) == 1
    assert out.count("data of the previous job") == 1
    same_runs(tmp_path / "sweep" / "1", train("alone", "adapter.rank=4", *settings, kind=kind))
    assert not same_tensors(adapter(tmp_path / "sweep" / "0"), adapter(tmp_path / "sweep" / "1"))
    assert SHARED.held(torch.device("cpu")) == 0  # when the sweep is over


def test_another_precision_frees_the_old_transformer_before_it_is_loaded(grid, loads, monkeypatch):
    held = []
    load = train.stages.model.load_transformer
    monkeypatch.setattr(
        train.stages.model,
        "load_transformer",
        lambda *a, **o: (held.append(SHARED.held(torch.device("cpu"))), load(*a, **o))[1],
    )
    code, out, err = grid("precision=fp32,bf16", "steps=1")
    assert code == 0, err
    assert loads.count("load_transformer") == 2
    assert held == [0, 0]
    assert USED not in out


def test_what_a_job_left_is_freed_before_an_encoder_is_loaded(grid, monkeypatch):
    held, at_start = [], []
    load, prepare = LocalTextEncoder.load, train.stages.data.prepare_samples

    def spied(*arguments):
        held.append(SHARED.held(torch.device("cpu")))
        return load(*arguments)

    def prepared(run):
        at_start.append(SHARED.held(torch.device("cpu")))
        return prepare(run)

    monkeypatch.setattr(LocalTextEncoder, "load", spied)
    monkeypatch.setattr(train.stages.data, "prepare_samples", prepared)
    code, out, err = grid("sample.prompts=[a fox],[a red fox]", "cache_dir=null", "steps=1")
    assert code == 0, err
    assert held == [0, 0]
    assert at_start[0] == 0 < at_start[1]
    assert USED not in out


def test_nothing_is_kept_outside_of_a_sweep(train, loads):
    train("one", "steps=1")
    train("two", "steps=1")
    assert loads == ["load_transformer"] * 2


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), ValueError("x")],
    ids=["memory", "value"],
)
def test_after_a_job_that_failed_while_training_nothing_of_it_is_used(grid, train, at_step, loads, tmp_path, error):
    def fail():
        raise error

    at_step(2, fail)
    code, out, err = grid("adapter.rank=2,4")
    assert code == 2
    assert holds(err, "error: ... job 0 ... adapter.rank=2")
    assert loads.count("load_transformer") == 2
    assert USED not in out
    same_runs(tmp_path / "sweep" / "1", train("alone", "adapter.rank=4"))
    assert [job.status for job in records.read_jobs(tmp_path / "sweep")] == ["failed", "done"]


def test_a_job_refused_for_its_settings_costs_no_second_load(grid, loads):
    code, out, _ = grid("adapter.rank=2,0,8", "steps=1")
    assert code == 2
    assert loads == ["load_transformer"]
    assert out.count(USED) == 1


def test_a_transformer_that_is_not_as_it_was_is_not_used_again(grid, loads, monkeypatch):
    detach = reuse.adapters.detach

    def careless(wrapped):
        model = detach(wrapped)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3
        return model

    monkeypatch.setattr(reuse.adapters, "detach", careless)
    code, out, err = grid("adapter.rank=2,4", "steps=1")
    assert code == 0, err
    assert loads == ["load_transformer"] * 2
    assert USED not in out


def test_the_state_of_a_model_is_its_modules_and_the_bits_of_its_tensors():
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).requires_grad_(False)

    assert state_of(model()) == state_of(model())
    for change in (
        lambda m: m[0].weight.data.mul_(1.000001),
        lambda m: m[1].running_mean.add_(1e-9),
        lambda m: m[0].requires_grad_(True),
        lambda m: m.append(torch.nn.Identity()),
        lambda m: m.to(torch.bfloat16),
    ):
        changed = model()
        change(changed)
        assert state_of(changed) != state_of(model())
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.uint8, torch.bool, torch.float64):
        assert checksum(torch.ones(3, 2, dtype=dtype).t()) == checksum(torch.ones(2, 3, dtype=dtype)) != 0


def test_things_are_taken_by_their_key_and_kept_only_by_jobs_that_end_well():
    store, said = SharedObjects(), []

    def job(key, made, fails=False):
        with store.job(keeps=True):
            thing = store.take("thing", key, lambda: made, said.append)
            if fails:
                raise RuntimeError
            return thing

    assert job([1], "a") == "a"
    assert job([1], "b") == "a"
    assert [holds(text, "the thing ... previous job") for text in said] == [True]
    assert job([2], "c") == "c"
    with pytest.raises(RuntimeError):
        job([2], "d", fails=True)
    assert job([2], "e") == "e"
    assert len(said) == 2
    with store.job(keeps=True):
        store.drop("thing")
        store.take("thing", [2], lambda: "f", said.append)
        store.drop("thing")
    assert job([2], "g") == "g"


# ------------------------------------------------------------------ how jobs end


def test_the_table_is_what_the_jobs_logged(grid, tmp_path):
    code, out, err = grid("adapter.rank=2,0,4", "optimizer.lr=1e-3,1e-2", "steps=12", *LOOKS)
    assert code == 2, err
    place = tmp_path / "sweep"
    about = json.loads((place / "sweep.json").read_text())
    assert [job["status"] for job in about["jobs"]] == ["done", "done", "failed", "failed", "done", "done"]
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
    assert [row["adapter.rank"] for row in rows] == ["2", "2", "0", "0", "4", "4"]
    assert [row["validation_loss"] for row in rows if row["status"] == "done"] == [
        str(job["validation_loss"]) for job in done
    ]
    shown = next(line for line in out.splitlines() if line.startswith(f"{best['job']} * "))
    assert f"{best['validation_loss']:.4f}" in shown
    page = (place / "sweep.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 1 + 4  # before training, and each job that was done
    places = [page.index(f">job {number}</a>") for number in (0, 2, 4, 1, 3, 5)]
    assert places == sorted(places)  # a row for each rate, a column for each rank, that of failed jobs too
    assert page.count('style="--columns: 3"') == 2
    assert "<ol><li>a red cup</li></ol>" in page
    assert "://" not in page
    assert "<script" not in page
    assert all(f"{job['validation_loss']:.4f}" in page for job in done)
    assert about["jobs"][2]["error"] in unescape(page)
    assert all((place / str(number)).is_dir() and f'href="{number}/"' in page for number in range(6))


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


def test_the_free_memory_counts_what_the_job_before_left(model_folders, small):
    from train.planner.from_config import free_bytes

    run = load_config(compose(*small()))
    before = SHARED.held(torch.device("cpu"))
    with SHARED.job(keeps=True):
        base = SHARED.take("transformer", "key", lambda: load_base(run), str)
    try:
        assert isinstance(base, Base)
        weights = sum(tensor.nbytes for tensor in base.transformer.parameters())
        assert before == 0
        assert SHARED.held(torch.device("cpu")) >= weights > 0
        assert free_bytes(torch.device("cpu")) > weights
    finally:
        SHARED.free()
    assert SHARED.held(torch.device("cpu")) == 0


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
