import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from message_helpers import holds
from PIL import Image
from train_helpers import pixels

from flux2.pipeline import Pipeline
from train.checkpoints.checkpoint import checkpoints
from train.evaluate import EvaluationSettings, evaluate_runs, main
from train.evaluation import distances
from train.evaluation.features import Latents
from train.evaluation.findings import caution, find_problems
from train.reports import run_report
from train.utils.files import write_whole
from train.validation.sample_grid import sample_grid
from train.validation.samples import Sampler

pytest_plugins = ("train_helpers",)

PROMPTS = ["a red cup", "the blue fox"]
SHOWN = ["sample.prompts=[a red cup,the blue fox]", "sample.steps=2", "sample_every=4"]
KEPT = [*SHOWN, "checkpoint_every=2", "validate_every=2"]


def evaluate(run, **more):
    settings = {"seeds": [5], "strengths": [0, 1, 1.5], "device": "cpu", **more}
    return evaluate_runs(EvaluationSettings(str(run), **settings), Latents(32))


@pytest.fixture
def kept(reference, tmp_path):
    """A run that kept its checkpoints, for a test to do with as it likes."""
    return shutil.copytree(reference(*KEPT), tmp_path / "run")


@pytest.fixture(scope="session")
def evaluated_once():
    """Where there is a run of which all pictures are drawn, once one is."""
    return []


@pytest.fixture
def drawn(kept, evaluated_once, tmp_path_factory):
    """The same, with all pictures drawn that `evaluate` asks for."""
    if not evaluated_once:
        whole = shutil.copytree(kept, tmp_path_factory.mktemp("drawn") / "run")
        evaluate(whole)
        evaluated_once.append(whole / "evaluation" / "pictures")
    shutil.copytree(evaluated_once[0], kept / "evaluation" / "pictures")
    return kept


def loaded(files):
    return [Image.open(file).convert("RGB") for file in files]


def damage(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def test_every_checkpoint_draws_what_inference_gives_and_nothing_is_drawn_twice(kept, monkeypatch):
    run = kept
    (found,) = evaluate(run)
    assert [row.name for row in found.rows] == ["base", "step 2", "step 4"]
    assert found.columns == [(0, 5), (1, 5)]
    from train.stages.saved_run import SavedRun

    opened = SavedRun(run, "cpu", {}, [5])
    pipe = Pipeline(opened.config.source, torch.device("cpu"), opened.config.precision, keep_text_encoder=True)
    sampling = {"seed": [5, 5], "steps": 2, "width": 48, "height": 48}
    for row, adapter in zip(found.rows, [None, *checkpoints(run)], strict=True):
        if row.step == 4:  # adapters add up
            pipe = Pipeline(opened.config.source, torch.device("cpu"), opened.config.precision, keep_text_encoder=True)
        if adapter is not None:
            pipe.load_adapter(adapter)
        expected = pipe.generate(PROMPTS, **sampling)
        for ours, theirs in zip(loaded(row.files), expected, strict=True):
            assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
    base, first, last = found.rows
    assert base.to_base == 0
    assert 0 < first.to_base < last.to_base
    assert [row.name for row in found.strengths] == ["0", "1", "1.5"]
    assert found.strengths[0].files == base.files
    assert found.strengths[2].to_base > last.to_base * 0.9
    assert len(found.trained) == 6
    numbers = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert [row["to_base"] for row in numbers["rows"]] == [base.to_base, first.to_base, last.to_base]
    assert Image.open(run / "evaluation" / "grid.png").height > 3 * 48

    monkeypatch.setattr(Sampler, "picture", lambda *arguments: pytest.fail("drawn again"))
    assert evaluate(run)[0].rows[2].to_base == last.to_base


def test_an_interrupted_evaluation_goes_on_where_it_was(kept, monkeypatch):
    run, drawn = kept, []
    picture = Sampler.picture

    def stopping(self, model, i, seed):
        drawn.append(i)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return picture(self, model, i, seed)

    monkeypatch.setattr(Sampler, "picture", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run)
    assert len(list((run / "evaluation" / "pictures").glob("*.png"))) == 3
    evaluate(run)
    # base, two checkpoints, and two more at 1.5: eight in all, and the one that was stopped
    assert len(drawn) == 8 + 1


def test_damaged_checkpoints_are_named_and_the_rest_go_on(train, capsys):
    run = train("run", *KEPT, "ema_decay=0.9", "cache_dir=null")
    damage(run / "checkpoints" / "step_000002" / "adapter" / "adapter_model.safetensors")
    damage(run / "checkpoints" / "step_000004" / "ema.pt")  # no part of what is evaluated
    capsys.readouterr()
    (found,) = evaluate(run, strengths=[])
    assert [row.name for row in found.rows] == ["base", "step 4"]
    assert "step_000002/adapter/adapter_model.safetensors" in found.damaged[0]
    said = capsys.readouterr().err
    assert "step_000002" in said
    assert "\r" not in said  # no bar where nobody watches


def test_runs_side_by_side_draw_the_same_prompts_with_the_adapter_that_each_chose(kept, train):
    one = kept
    other = train("other", "optimizer.lr=1e-3", "checkpoint_every=2", "validate_every=2")  # without prompts
    first, second = evaluate(one, compare=str(other))
    assert first.prompts == second.prompts == PROMPTS
    assert [row.name for row in second.rows] == ["base", second.chosen]
    assert all(
        np.array_equal(pixels(a), pixels(b))
        for a, b in zip(loaded(first.base.files), loaded(second.base.files), strict=True)
    )
    assert not (other / "evaluation" / "evaluation.json").exists()


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high_shows_in_the_numbers(train):
    good = train("good", *KEPT, "optimizer.lr=1e-3")
    bad = train("bad", *KEPT, "optimizer.lr=30")
    assert find_problems(good, evaluate(good)[0]) == []
    said = "\n".join(find_problems(bad, evaluate(bad)[0]))
    assert "alike" in said
    assert "6 samples" in caution(good)


def test_pictures_that_are_not_finite_are_counted_and_the_rest_go_on(kept, monkeypatch):
    run, picture = kept, Sampler.picture

    def broken(self, model, i, seed):
        if i == 1 and hasattr(model, "peft_config"):
            raise ValueError("the picture that was computed has NaN or infinite pixels")
        return picture(self, model, i, seed)

    monkeypatch.setattr(Sampler, "picture", broken)
    (found,) = evaluate(run)
    assert [row.failed for row in found.rows] == [0, 1, 1]
    assert "step 2 1 of 2" in "\n".join(find_problems(run, found))


def test_without_the_training_pictures_all_else_is_there(drawn):
    run = drawn
    config = run / "config.yaml"
    lines = ["  path: /gone" if "/pictures" in line else line for line in config.read_text().splitlines()]
    config.write_text("\n".join(lines) + "\n")
    (found,) = evaluate(run)
    assert "training images" in found.notes[0]
    assert found.rows[1].to_training is None
    assert found.rows[1].to_base > 0
    without = yaml.safe_load(config.read_text())
    without["sample"]["prompts"] = []
    config.write_text(yaml.safe_dump(without))
    with pytest.raises(ValueError, match=r"prompts=null: .*training images are not available.*/gone"):
        evaluate(run)


def test_what_cannot_be_evaluated_is_one_clear_error(kept, tmp_path):
    run = kept
    with pytest.raises(ValueError, match=r"run='?/nowhere\b"):
        evaluate("/nowhere")
    with pytest.raises(ValueError, match=rf"{tmp_path}\b.*config\.yaml"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match=r"\b3\b.*2, 4"):
        evaluate(run, checkpoints=[3])
    with pytest.raises(ValueError, match="compare"):
        evaluate(run, compare=str(run))
    for place in checkpoints(run):
        damage(place / "adapter" / "adapter_model.safetensors")
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{run}\b.*adapter"):
        evaluate(run)


def test_where_a_grid_cannot_be_put_that_is_one_error_and_nothing_unfinished_stays(kept, reference, tmp_path):
    run = kept
    (run / "evaluation" / "grid.png").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"grid\.png.*Is a directory"):
        evaluate(run)
    assert not list(run.rglob(".*.tmp"))
    assert len(list((run / "evaluation" / "pictures").glob("*.png"))) == 8
    other = shutil.copytree(reference(*KEPT), tmp_path / "other")
    (other / "evaluation").write_text("in the place of a folder")
    with pytest.raises(ValueError, match=rf"{other / 'evaluation'}"):
        evaluate(other)


def test_a_checkpoint_that_is_rotated_away_meanwhile_is_named_and_the_same_command_goes_on(kept, monkeypatch):
    run, picture = kept, Sampler.picture

    def rotating(self, model, i, seed):
        shutil.rmtree(run / "checkpoints" / "step_000002", ignore_errors=True)
        return picture(self, model, i, seed)

    monkeypatch.setattr(Sampler, "picture", rotating)
    with pytest.raises(ValueError, match=r"step_000002/adapter .*removed"):
        evaluate(run)
    assert len(list((run / "evaluation" / "pictures").glob("*.png"))) == 2
    assert [row.name for row in evaluate(run)[0].rows] == ["base", "step 4"]


def test_secrets_in_prompts_are_in_no_file_of_an_evaluation(kept, monkeypatch):
    run, captions = kept, []
    monkeypatch.setenv("WANDB_API_KEY", "notforothers0123")
    drawing = sample_grid

    def noted(rows, columns, *arguments):
        captions.extend(columns)
        return drawing(rows, columns, *arguments)

    monkeypatch.setattr("train.evaluate.sample_grid", noted)
    prompts = ["a cup notforothers0123", "at https://joe:geheim77@cups.example/x?token=othersecret"]
    made = evaluate(run, prompts=prompts, strengths=[])
    run_report.write(run, made)
    for file in [one for one in run.rglob("*") if one.is_file()]:
        assert not [word for word in (b"notforothers", b"geheim77", b"othersecret") if word in file.read_bytes()], file
    assert captions == ["a cup *** (seed 5)", "at https://***@cups.example/x?token=*** (seed 5)"]


def test_a_full_disk_and_a_stop_leave_whole_pictures_alone(tmp_path, monkeypatch):
    picture = Image.new("RGB", (8, 8))
    write_whole(tmp_path / "one.png", picture)
    before = (tmp_path / "one.png").read_bytes()

    def half(error):
        def save(self, file, kind):
            file.write_bytes(b"half")
            raise error

        return save

    for error, raised in (
        (OSError(28, "No space left on device"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        monkeypatch.setattr(Image.Image, "save", half(error))
        with pytest.raises(raised):
            write_whole(tmp_path / "one.png", picture)
        assert [file.name for file in tmp_path.iterdir()] == ["one.png"]
        assert (tmp_path / "one.png").read_bytes() == before


def test_a_relative_dataset_that_is_not_here_says_where_to_start(drawn):
    run = drawn
    config = run / "config.yaml"
    lines = ["  path: cards" if "/pictures" in line else line for line in config.read_text().splitlines()]
    config.write_text("\n".join(lines) + "\n")
    (found,) = evaluate(run, strengths=[])
    assert holds(found.notes[0], f"{Path.cwd()} ... start")


def test_an_empty_run_is_refused():
    with pytest.raises(ValueError, match=r"^run="):
        EvaluationSettings("")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("compare", ""),
        ("compare", [" "]),
        ("seeds", []),
        ("seeds", [0, 0]),
        ("seeds", [-1]),
        ("strengths", ["x"]),
        ("prompts", "a cup"),
    ],
)
def test_settings_are_checked(key, value):
    with pytest.raises(ValueError, match=f"^{key}="):
        EvaluationSettings("run", **{key: value})


def test_the_command_says_what_is_wrong_in_one_line(run_command):
    def refused(*arguments):
        return run_command.refused("run=/nowhere", *arguments, task=main, name="evaluate")

    assert holds(refused("features=lantents"), "features=lantents ... did you mean latents?")
    assert refused("-m").startswith("-m")  # Hydra did not begin a sweep, whose folder would be left
    assert holds(refused("seedz=[1]"), "seedz=[1] ... did you mean seeds?")
    assert holds(refused(), "run=/nowhere")


# ------------------------------------------------------------------ measures


def test_a_copy_is_nearer_than_training_pictures_are_to_one_another():
    vectors = [torch.tensor([float(i * i), 0.0]) for i in range(10)]  # 1, 3, 5 ... apart
    trained = distances.TrainingDistances.from_vectors(vectors)
    assert trained.own == (1, 1, 3, 5, 7, 9, 11, 13, 15, 17)
    copy = trained.nearest(torch.tensor([36.0, 0.1]))
    assert (copy.index, copy.nearer_than, copy.suspicious) == (6, 1.0, True)
    other = trained.nearest(torch.tensor([36.0, 4.0]))
    assert (other.index, other.distance, other.nearer_than, other.suspicious) == (6, 4.0, 0.7, False)


def test_few_training_pictures_make_nothing_suspicious():
    trained = distances.TrainingDistances.from_vectors([torch.tensor([0.0]), torch.tensor([9.0])])
    assert not trained.nearest(torch.tensor([0.1])).suspicious
    assert distances.TrainingDistances.from_vectors([torch.tensor([0.0])]).nearest(torch.tensor([0.1])).nearer_than == 0


def test_spread_is_the_mean_distance_of_two():
    assert distances.spread([torch.tensor([0.0]), torch.tensor([3.0]), torch.tensor([6.0])]) == 4
    assert distances.spread([torch.tensor([0.0])]) is None
