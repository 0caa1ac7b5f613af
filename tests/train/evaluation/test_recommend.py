import json

import pytest
from omegaconf import OmegaConf
from train_helpers import ask_to_stop

from train.checkpoints.checkpoint import STATE_FILE
from train.evaluation.recommend import MAX_ROWS, Validation, difference, recommend, recommend_or_warn, validations

pytest_plugins = ("train_helpers",)

SAMPLES = 6
# what the samples differ by from each other, far more than steps do
LEVELS = [0.2, 0.5, 0.9, 1.4, 0.3, 0.7]
NAN = float("nan")


@pytest.fixture
def run(tmp_path):
    """`run({step: losses}, [saved steps])`: a run folder; a loss is one number for all samples, or one for each."""

    def make(losses, saved, *, held_out=SAMPLES, times=(0.2, 0.8), **config):
        lines = []
        for step, given in losses.items():
            each = given if isinstance(given, list) else [given * level for level in LEVELS]
            rows = [[loss * 0.9, loss * 1.1] for loss in each]
            lines.append({"step": step, "times": list(times), "samples": list("abcdef")[: len(each)], "losses": rows})
        if lines:
            (tmp_path / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for step in saved:
            place = tmp_path / "checkpoints" / f"step_{step:06d}"
            place.mkdir(parents=True)
            (place / STATE_FILE).write_text("{}")
        settings = {"steps": 400, "validate_every": 100, "validation": {"held_out": held_out, "times": list(times)}}
        OmegaConf.save(OmegaConf.create({**settings, **config}), tmp_path / "config.yaml")
        return tmp_path

    return make


def recommended(folder):
    """The name of the recommended checkpoint, and all lines."""
    found = recommend(folder)
    return found.checkpoint and found.checkpoint.name, "\n".join(found.lines)


BETTER = [0.9 * level for level in LEVELS[:3]]
MIXED = [*BETTER, *(1.05 * level for level in LEVELS[3:])]  # three gain, three lose


def test_the_checkpoint_of_the_lowest_loss_is_recommended_with_what_it_gains(run):
    name, text = recommended(run({0: 1.0, 100: 0.9, 200: 0.8, 300: 0.9, 400: 1.0}, [100, 200, 300, 400]))
    assert name == "step_000200"
    *table, reason = text.splitlines()
    assert table == [
        "validation loss, 6 samples set aside at 2 times:",
        "  step      0  0.6667  the base",
        "  step    100  0.6000  -10.0 %",
        "  step    200  0.5333  -20.0 %  lowest",
        "  step    300  0.6000  -10.0 %",
        "  step    400  0.6667  +0.0 %",
    ]
    assert f"checkpoints/{name}: its validation loss is the lowest, 0.13 (-20.0 %) below the last one's" in reason
    assert "beyond the noise" in reason
    assert reason.startswith("recommended /")  # without reservation


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        # samples that do not agree on a difference: it is noise
        ({0: 2.0, 200: MIXED, 400: 1.0}, "on 2 validations alone, ; within the noise; grids decide"),
        ({0: 2.0, 100: 1.5, 200: MIXED, 400: 1.0}, "by less than the noise, "),
        # of two samples even a difference on which both agree is no evidence, and of two steps one is always lower
        (
            {0: [1.0, 2.0], 200: [0.8, 1.8], 400: [0.9, 1.9]},
            "on 2 samples and 2 validations alone, ; 2 samples cannot tell; grids decide",
        ),
        ({0: [1.0], 200: [0.5], 400: [0.8]}, "on 1 sample and 2 validations alone, ; 1 sample cannot tell"),
    ],
)
def test_how_little_a_recommendation_rests_on_is_said_with_it(run, losses, said):
    name, text = recommended(run(losses, [step for step in losses if step]))
    assert name == "step_000200"
    reservation, *reasons = said.split("; ")
    assert f"\nrecommended, {reservation}" in text
    assert all(part in text for part in reasons)
    assert "beyond" not in text


@pytest.mark.parametrize("saved", [[200, 400], []])
@pytest.mark.parametrize(
    ("base", "first", "last", "said", "verdict", "factor"),
    [
        (
            1.0,
            1.05,
            1.1,
            "none predicts better; is 0.7 after step 200, ; base's is 0.6667 (+5.0 %)",
            "none predicts",
            1,
        ),
        (1.0, 1.2, 1.637, "the run diverged; is 1.091 after step 400, ; (+63.7 %)", "the run diverged, +63.7 %", 0.1),
        (1.0, 1.0, 1.4, "the run diverged; is 0.9333 after step 400", "the run diverged, +40.0 %", 0.1),
        (0.0, 1.2, 1.4, "the run diverged; and the base's is 0 (from 0)", "the run diverged, from 0", 0.1),
        (0.0, 0.0, 0.0, "nothing was learned; is 0 after step 200, and the base's is 0", "nothing was learned", 10),
        (1e-315, 1.2, 1.4, "the run diverged; (from 0)", "the run diverged", 0.1),
        (1.0, 0.9996, 0.9995, "nothing was learned; Train for more steps", "nothing was learned, -0.0 %", 10),
        (1.0, 1.0004, 0.9999, "nothing was learned; raise optimizer.lr", "nothing was learned, -0.0 %", 10),
    ],
)
def test_of_a_run_that_is_nowhere_better_than_the_base_nothing_is_recommended(
    run, base, first, last, said, verdict, factor, saved
):
    """A change of all samples alike is beyond what their choice explains, however small it is."""
    folder = run({0: base, 200: first, 400: last}, saved)
    name, text = recommended(folder)
    assert name is None
    reason = text.splitlines()[-1]
    assert reason.startswith("no checkpoint is recommended: ")
    assert all(part in reason for part in said.split("; ")), reason
    assert "optimizer.lr" in reason
    found = recommend(folder)
    assert found.verdict.startswith(f"none ({verdict}")
    assert found.rate_factor == factor
    assert (found.unfit == "") == (factor == 10)


@pytest.mark.parametrize(
    ("losses", "saved", "verdict"),
    [
        ({0: 1.0, 20: 0.931}, [20], "step 20 (-6.9 %, the only one measured)"),
        ({20: 0.931}, [20], "step 20 (the only one measured)"),
        ({0: 1.0, 100: 0.9, 200: 0.8, 300: 0.7}, [100, 200, 300], "step 300 (-30.0 %)"),
        ({0: 1.0, 200: 0.9, 400: 0.8}, [200, 400], "step 400 (-20.0 %, on 2 validations alone)"),
        ({}, [20], "none (nothing was validated)"),
        ({0: 1.0, 20: 0.9}, [], "none (none was saved but the last step)"),
    ],
)
def test_the_outcome_fits_in_one_line(run, losses, saved, verdict):
    assert recommend(run(losses, saved)).verdict == verdict


@pytest.mark.parametrize(
    ("losses", "unfit"),
    [
        ({0: 1.0, 200: 0.8, 400: 1.4}, "is 0.9333, and the base's 0.6667 (+40.0 %)"),
        ({0: 1.0, 200: 0.8, 400: NAN}, "not finite after step 400"),
        ({0: 1.0, 200: 0.8, 400: 0.9}, ""),
        ({0: 0.0, 200: 0.8, 400: 0.9}, "(from 0)"),
    ],
)
def test_a_finished_adapter_that_is_worse_than_the_base_is_unfit_whatever_is_recommended(run, losses, unfit):
    found = recommend(run(losses, [200, 400]))
    assert unfit in found.unfit
    assert bool(found.unfit) == bool(unfit)
    assert (found.checkpoint is None) == (losses[0] == 0)


def write_training(folder, first, last, count=10):
    lines = [{"step": step + 1, "loss": first if step < count else last} for step in range(2 * count)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("losses", "saved"), [({}, [200]), ({200: 0.8, 400: 0.9}, [200, 400])])
def test_without_a_loss_of_the_base_the_training_loss_tells_that_a_run_diverged(run, losses, saved):
    folder = run(losses, saved)
    write_training(folder, 1.0, 1.2)
    assert recommend(folder).unfit == ""
    write_training(folder, 1.0, 1.3)
    name, text = recommended(folder)
    assert name is None
    assert "no checkpoint is recommended: the run diverged: the training loss rose: from 1 to 1.3" in text
    assert "optimizer.lr" in text
    write_training(folder, 1.0, 1.3, count=9)  # too few to tell
    assert recommend(folder).unfit == ""
    for first, unfit in ((1.0, "the training loss rose early: from 1 to 50"), (25.1, "")):
        lines = [{"step": step + 1, "loss": first if step < 2 else 50.0} for step in range(20)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert recommend(folder).unfit.startswith(unfit)
        assert bool(recommend(folder).unfit) == bool(unfit)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (
            [1.5, 1.8, 1.6, 80.0, 91.0, 85.0],
            "the run diverged: the training loss rose: from 1.8 to 85.33 within 6 logged",
        ),
        (
            [41.0, 47.0, 44.0],
            "nothing was validated. Its training loss went from 41 to 44 in 3 logged steps. 44 is far above 2",
        ),
        (
            [12.5, 8.3, 2.7, 2.6],
            "from 10.4 to 2.65 in 4 logged steps. 10.4 is far above 2, that of a prediction of zero",
        ),
        ([1.8, 1.7, 1.6], "nothing was validated. Its training loss went from 1.8 to 1.6 in 3 logged steps. Set"),
        (
            [0.08, 0.1, 0.2, 1.7],
            "nothing was validated. Its training loss went from 0.09 to 0.95 in 4 logged steps. Set",
        ),
        ([], "nothing was validated. Set"),
    ],
)
def test_of_a_short_run_without_validation_what_its_losses_tell_is_said(run, training, said):
    kinds = {"target": "Flow", "loss": "MSE", "weighting": "Unweighted"}
    folder = run({}, [20], **{group: {"_target_": f"train.objective.{kind}"} for group, kind in kinds.items()})
    lines = [{"step": step + 1, "loss": loss} for step, loss in enumerate(training)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = recommend(folder)
    assert found.checkpoint is None
    assert said in found.reasons[0]
    assert bool(found.unfit) == ("the run diverged" in said)
    diverged = "diverged" in said or "far above" in said
    assert found.rate_factor == (0.1 if diverged else 1)
    assert ("diverged" in found.verdict) == diverged


def test_a_loss_in_another_unit_is_not_compared_with_that_of_a_prediction_of_zero(run):
    folder = run({}, [20], target={"_target_": "train.objective.Contrastive"})
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 41.0}\n')
    assert "from 41 to 41 in 1 logged step. Set" in recommend(folder).reasons[0]


def test_single_low_losses_at_the_start_are_no_divergence(run):
    """A loss varies with the drawn timestep, and with weighting=bell twentyfold."""
    folder = run({}, [200])
    losses = [1.6, 0.08, *[1.7] * 8, *[1.4] * 10]
    lines = [{"step": step + 1, "loss": loss} for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recommend(folder).unfit == ""


def test_losses_of_the_training_do_not_overrule_a_validation_that_fell(run):
    folder = run({0: 1.0, 200: 0.9, 400: 0.8}, [200, 400])
    write_training(folder, 1.0, 1.3)
    assert recommend(folder).unfit == ""
    assert recommended(folder)[0] == "step_000400"


def test_a_run_that_diverges_ends_without_a_recommendation_in_lines_report_and_card(run_command, small, tmp_path):
    folder = tmp_path / "run"
    settings = small(f"output_dir={folder}", "steps=2", "validate_every=2", "checkpoint_every=2", "optimizer.lr=30")
    code, out, err = run_command(*settings, "validation.held_out=2", "max_grad_norm=1e9")
    assert code == 0, err
    assert "no checkpoint is recommended: none predicts better than the base" in out
    assert "\nbest checkpoint: none (none predicts better than the base, +" in out
    assert "\nrecommended" not in out
    assert "careful   the adapter of the last step is not recommended: its validation loss is" in out
    assert "try it    python -m flux2.generate" in out
    assert "use it" not in out
    assert "No checkpoint is recommended: none predicts better" in (folder / "report.html").read_text()
    assert "| not recommended | its validation loss is" in (folder / "adapter" / "README.md").read_text()


def test_the_noise_is_that_of_the_paired_differences():
    levels = [Validation(1, tuple(0.9 * level for level in LEVELS)), Validation(2, tuple(LEVELS))]
    found = difference(*levels)
    margin = 2.5706 * 0.044121 / 6**0.5  # Student's t for 5 degrees at 97.5 %, and the differences' deviation
    assert (found.mean, found.low, found.high) == pytest.approx((-1 / 15, -1 / 15 - margin, -1 / 15 + margin), abs=2e-5)
    assert found.is_clear
    shuffled = Validation(1, tuple(reversed(levels[0].losses)))
    assert not difference(shuffled, levels[1]).is_clear  # the same means, of other samples
    assert not difference(Validation(1, (1.0,)), Validation(2, (2.0,))).is_clear
    many = Validation(1, tuple(level + 0.1 for level in LEVELS * 20)), Validation(2, tuple(LEVELS * 20))
    assert difference(*many).mean == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({0: 1.0, 200: 0.9, 400: 0.8}, "-20.0 % against the base, beyond what the choice of"),
        ({0: [1.0, 2.0], 200: [0.9, 1.9], 400: [0.8, 1.8]}, "-13.3 % against the base (2 samples cannot tell"),
    ],
)
def test_the_last_one_is_compared_with_the_base(run, losses, said):
    name, text = recommended(run(losses, [200, 400]))
    assert name == "step_000400"
    assert "the last one has the lowest validation loss" in text
    assert said in text
    assert "training for longer" in text


def test_training_samples_say_little(run):
    _, text = recommended(run({0: 1.0, 400: 0.8}, [400], held_out=0))
    assert "6 training samples at 2 times" in text
    assert "says little" in text
    assert "validation.held_out=4" in text


@pytest.mark.parametrize(
    ("losses", "saved", "said"),
    [
        ({}, [200], "nothing was validated. Set validation.samples=8; validation.held_out=4"),
        ({0: 1.0, 200: 0.5, 400: 0.8}, [], "checkpoint_every=250"),
        ({0: 1.0, 100: 0.5, 300: 0.8}, [50, 150], "checkpoint_every to a multiple of validate_every"),
        ({0: [1.0, NAN, 0.5], 400: [0.9, NAN, 0.4]}, [400], "no validation loss is finite; for b: delete the cache"),
        ({0: NAN, 400: NAN}, [400], "no validation loss is finite; before training: the base may be damaged"),
        (
            {0: 1.0, 200: NAN, 400: NAN},
            [400],
            "diverged: no validation loss of a trained adapter is finite; by step 200",
        ),
        ({200: NAN, 400: NAN}, [400], "no validation loss is finite; by step 200: a lower optimizer.lr"),
    ],
)
def test_where_none_can_be_recommended_it_says_why_and_what_to_set(run, losses, saved, said):
    name, text = recommended(run(losses, saved))
    assert name is None
    assert text.splitlines()[-1].startswith("no checkpoint is recommended: ")
    assert all(part in text for part in said.split("; "))
    if not saved:
        assert "  step    200  0.3333  -50.0 %  lowest" in text.splitlines()


def test_without_validation_the_interval_is_named(run):
    assert "Set validate_every=50" in recommended(run({}, [200], validate_every=0))[1]


def test_what_was_not_kept_or_not_validated_is_said(run):
    name, text = recommended(run({0: 1.0, 100: 0.5, 200: 0.8, 400: 0.9}, [200, 250, 400]))
    assert name == "step_000200"
    assert "and 1 not validated (step 250): " in text
    assert "the lowest of all, 0.3333, was after step 100, which is not kept" in text


def test_without_the_base_only_steps_are_compared(run):
    name, text = recommended(run({300: 0.7, 400: 0.9}, [300, 400]))  # a branch that was resumed from step 250
    assert name == "step_000300"
    assert "the base" not in text


def test_only_what_the_last_validation_measured_is_compared(run):
    folder = run({0: 1.0, 100: 0.9, 200: 0.8}, [100, 200])
    lines = (folder / "validation.jsonl").read_text().splitlines()
    other = json.loads(lines[1]) | {"samples": list("uvwxyz"), "losses": [[0.1, 0.1]] * SAMPLES}
    (folder / "validation.jsonl").write_text("\n".join([lines[0], json.dumps(other), lines[2], '{"step": 3, "loss']))
    assert [one.step for one in validations(folder)] == [0, 200]
    assert recommended(folder)[0] == "step_000200"


def test_of_many_checkpoints_the_lowest_and_the_last_are_shown(run):
    steps = range(0, 2001, 100)
    name, text = recommended(
        run({step: 1 + abs(step - 600) / 1000 for step in steps}, [step for step in steps if step])
    )
    assert name == "step_000600"
    assert text.count("  step") == MAX_ROWS + 1
    assert "step   2000" in text
    assert "10 checkpoints" in text


def test_what_cannot_be_read_is_a_warning_and_no_error(run):
    folder = run({0: 1.0, 400: 0.8}, [400])
    for name, content in (
        ("validation.jsonl", '{"step": 1, "samples": [], "times": [], "losses": [["x"]]}\n'),
        ("config.yaml", "{"),
    ):
        (folder / name).write_text(content)
        assert recommend_or_warn(folder).lines[0].startswith("warning: no checkpoint can be recommended")


def test_the_command_ends_with_a_recommendation_also_when_resumed(run_command, small, at_step, tmp_path):
    settings = small(
        f"output_dir={tmp_path / 'run'}", "steps=3", "validate_every=1", "checkpoint_every=1", "validation.held_out=2"
    )
    at_step(1, ask_to_stop())
    assert run_command(*settings)[0] != 0
    code, out, err = run_command(*settings, "resume=auto")
    assert code == 0, err
    found = recommend(tmp_path / "run")
    assert "\n".join(found.lines) in out
    assert found.checkpoint in [tmp_path / "run" / "checkpoints" / f"step_{step:06d}" for step in (1, 2, 3)]
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["validation_loss"] for line in losses}
    assert list(by_step) == [one.step for one in validations(tmp_path / "run")] == [0, 1, 2, 3]
    for one in validations(tmp_path / "run"):
        assert one.mean == pytest.approx(by_step[one.step], rel=1e-6)
    assert int(found.checkpoint.name[5:]) == min((1, 2, 3), key=by_step.get)
    assert f"step {0:>6}  {by_step[0]:.4f}  the base" in out
