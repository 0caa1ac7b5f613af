"""Where a run goes on, or starts: the rules of `resume`."""

import pytest
from checkpoint_helpers import ANEW, CONFIG, changed, look, make_run
from message_helpers import holds

from train.checkpoints.resume import PLACES, RunLocation
from train.utils.lock import InUse, Lock

# ------------------------------------------------------------------ where a run goes on


def test_a_new_run_starts_in_its_own_folder(tmp_path):
    assert look(None, tmp_path / "new") == RunLocation(tmp_path / "new", None)
    assert RunLocation(tmp_path / "new").step == 0


def test_a_new_run_into_the_folder_of_another_is_refused(tmp_path):
    make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"output_dir=.*run\b.*resume=auto"):
        look(None, tmp_path / "run", chosen=True)


@pytest.mark.parametrize("name", ["adapter", "samples", "checkpoints", "report.html", "data.json", "validation.jsonl"])
def test_a_part_of_a_run_is_not_written_over(tmp_path, name):
    place = tmp_path / "x" / name
    place.mkdir(parents=True)
    for resume in (None, "auto"):
        assert look(resume, tmp_path / "x", chosen=True).checkpoint is None  # an empty folder is none
    if place.suffix:
        place.rmdir()
        place.touch()
    else:
        (place / "file").touch()
    with pytest.raises(ValueError, match=rf"already holds a run \({name}\)\. Choose another folder$"):
        look(None, tmp_path / "x", chosen=True)
    with pytest.raises(ValueError, match=rf"cannot be resumed \({name}\).*Move them"):
        look("auto", tmp_path / "x", chosen=True)


def test_a_run_folder_goes_on_from_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", 2, 10, 9)
    place = look(str(run), tmp_path / "new")
    assert place == RunLocation(run, run / "checkpoints" / "step_000010")
    assert place.step == 10


def test_the_newest_checkpoint_can_be_given_itself(tmp_path):
    run = make_run(tmp_path / "run", 2, 4)
    newest = run / "checkpoints" / "step_000004"
    assert look(str(newest), tmp_path / "new") == RunLocation(run, newest)


def test_an_older_checkpoint_needs_a_folder_of_its_own_to_branch_off_into(tmp_path):
    run = make_run(tmp_path / "run", 2, 4)
    older = run / "checkpoints" / "step_000002"
    with pytest.raises(ValueError, match=r"step_000004\b.*output_dir="):
        look(str(older), tmp_path / "new")
    branch = tmp_path / "branch"
    assert look(str(older), branch, chosen=True) == RunLocation(branch, older)
    make_run(branch)
    with pytest.raises(ValueError, match=r"branch"):
        look(str(older), branch, chosen=True)


def test_a_checkpoint_that_was_not_finished_is_no_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", 2)
    (run / "checkpoints" / "step_000004").mkdir()  # without its state.json
    (run / "checkpoints" / ".step_000006.part").mkdir()
    (run / "checkpoints" / ".step_000006.part" / "state.json").write_text('{"step": 6}')
    assert look(str(run), tmp_path / "new").step == 2
    with pytest.raises(ValueError, match=r"run folder.*complete checkpoint"):
        look(str(run / "checkpoints" / "step_000004"), tmp_path / "new")


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"resume='?/nowhere.*auto"):
        look("/nowhere", tmp_path / "new")
    with pytest.raises(ValueError, match=r"run folder.*complete checkpoint"):
        look(str(tmp_path), tmp_path / "new")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        look(str(make_run(tmp_path / "run")), tmp_path / "new")


def test_a_finished_run_needs_more_steps_to_go_on(tmp_path):
    run = make_run(tmp_path / "run", 10, finished=True)
    with pytest.raises(ValueError, match=r"10 steps.*steps=11"):
        look(str(run), tmp_path / "new")
    assert look(str(run), tmp_path / "new", changed(steps=12)).step == 10
    with pytest.raises(ValueError, match="10 steps"):
        look(str(run), tmp_path / "new", changed(steps=8))


def test_a_run_that_was_killed_before_its_adapter_was_written_is_finished_off(tmp_path):
    run = make_run(tmp_path / "run", 10)
    assert look(str(run), tmp_path / "new").step == 10
    assert look("auto", tmp_path / "new").step == 10


# ------------------------------------------------------------------ another configuration


def test_one_error_lists_all_keys_that_differ(tmp_path):
    run = make_run(tmp_path / "run", 2)
    config = changed(model={"name": "dev"}, adapter={"rank": 8}, dataset={"limit": 3}, seed=1)
    with pytest.raises(ValueError, match="configuration") as error:
        look(str(run), tmp_path / "new", config)
    for difference in (
        "model.name=tiny ... dev",
        "adapter.rank=4 ... 8",
        "dataset.limit=null ... 3",
        "seed=0 ... 1",
    ):
        assert holds(str(error.value), difference)
    assert "adapter.targets" not in str(error.value)


def test_a_key_that_only_one_of_them_has_differs(tmp_path):
    run = make_run(tmp_path / "run", 2)
    with pytest.raises(ValueError, match=r"adapter\.alpha=null.*\b2\b"):
        look(str(run), tmp_path / "new", changed(adapter={"alpha": 2}))


def test_a_run_from_before_a_key_goes_on_with_what_the_key_was_then(tmp_path):
    run = make_run(tmp_path / "run", 2)
    new = {"init": None, "init_mode": "continue", "dtype": "fp32"}
    assert look(str(run), tmp_path / "new", changed(adapter=new)).step == 2
    with pytest.raises(ValueError, match=r"adapter\.dtype='fp32' there, 'bf16' here"):
        look(str(run), tmp_path / "new", changed(adapter=new | {"dtype": "bf16"}))


def test_keys_that_change_nothing_learned_may_differ(tmp_path):
    run = make_run(tmp_path / "run", 2)
    config = changed(steps=20, name="b", sample={"prompts": ["a"]}) | {"log_every": 3, "cache_dir": "/x"}
    assert look(str(run), tmp_path / "new", config).step == 2


def test_a_run_may_go_on_with_more_patience_for_its_text_encoder_but_not_with_another(tmp_path):
    there = CONFIG | {"text_encoder": {"url": "http://one", "timeout": 1.0, "max_concurrent_requests": 4}}
    run = make_run(tmp_path / "run", 2, config=there)
    patient = CONFIG | {"text_encoder": {"url": "http://one", "timeout": 9.0, "max_concurrent_requests": 1}}
    assert look(str(run), tmp_path / "new", patient).step == 2
    with pytest.raises(ValueError, match=r"text_encoder\.url='?http://one.*http://two"):
        look(
            str(run),
            tmp_path / "new",
            CONFIG | {"text_encoder": {"url": "http://two", "timeout": 1.0, "max_concurrent_requests": 4}},
        )


def test_images_may_be_cut_into_batches_differently_but_not_be_more_a_step(tmp_path):
    run = make_run(tmp_path / "run", 2)
    assert look(str(run), tmp_path / "new", changed(batch_size=2, gradient_accumulation=2)).step == 2
    with pytest.raises(ValueError, match=r"batch_size.*gradient_accumulation.*processes.*4\b.*\b8\b"):
        look(str(run), tmp_path / "new", images=8)
    assert look("auto", tmp_path / "new", images=8) == RunLocation(tmp_path / "new")


# ------------------------------------------------------------------ folders in use


def test_auto_skips_a_run_that_is_alive(tmp_path):
    run = make_run(tmp_path / "1", 2)
    lock = Lock(run)
    assert look("auto", tmp_path / "2") == RunLocation(tmp_path / "2")
    lock.release()
    assert look("auto", tmp_path / "2").folder == run


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_folder_that_was_asked_for_and_is_in_use_is_named(tmp_path, resume):
    run = make_run(tmp_path / "1", 2)
    lock = Lock(run)
    with pytest.raises(InUse, match=r"/1 .*in use"):
        look(resume, run, chosen=True)
    lock.release()


# ------------------------------------------------------------------ auto


def test_auto_takes_the_newest_unfinished_run_beside_the_new_one(tmp_path):
    make_run(tmp_path / "2026-01-01", 2)
    newest = make_run(tmp_path / "2026-01-03", 4)
    make_run(tmp_path / "2026-01-02", 6)
    assert look("auto", tmp_path / "2026-02-01") == RunLocation(newest, newest / "checkpoints" / "step_000004")


def test_auto_starts_anew_without_an_unfinished_run_of_this_configuration(tmp_path):
    fresh = tmp_path / "9-new"
    assert look("auto", fresh) == RunLocation(fresh)
    make_run(tmp_path / "1-finished", 10, finished=True)
    make_run(tmp_path / "2-without-checkpoint")
    make_run(tmp_path / "3-other-rank", 2, config=changed(adapter={"rank": 8}))
    make_run(tmp_path / "4-beyond", 20, config=changed(steps=30))
    (tmp_path / "5-no-run").mkdir()
    (tmp_path / "6-file").touch()
    assert look("auto", fresh) == RunLocation(fresh)


def test_a_finished_run_that_was_going_on_for_longer_is_unfinished_again(tmp_path):
    run = make_run(tmp_path / "1", 10, 12, finished=True, config=changed(steps=20))
    assert look("auto", tmp_path / "2", changed(steps=20)) == RunLocation(run, run / "checkpoints" / "step_000012")


def test_auto_with_a_folder_that_was_asked_for_looks_there_alone(tmp_path):
    make_run(tmp_path / "beside", 4)
    fresh, said = tmp_path / "mine", []
    assert look("auto", fresh, chosen=True, say=said.append) == RunLocation(fresh)
    assert [holds(line, ANEW) for line in said] == [True]
    make_run(fresh, 2)
    assert look("auto", fresh, chosen=True) == RunLocation(fresh, fresh / "checkpoints" / "step_000002")


def test_auto_starts_again_in_its_folder_if_nothing_was_saved_there(tmp_path):
    fresh, said = make_run(tmp_path / "mine"), []
    assert look("auto", fresh, chosen=True, say=said.append) == RunLocation(fresh)
    assert [holds(line, ANEW) for line in said] == [True]


def test_auto_does_not_write_into_a_folder_whose_run_is_finished_or_another(tmp_path):
    fresh = make_run(tmp_path / "mine", 10, finished=True)
    with pytest.raises(ValueError, match=r"10 steps.*steps=11"):
        look("auto", fresh, chosen=True)
    with pytest.raises(ValueError, match=r"configuration.*adapter\.rank=4.*\b8\b"):
        look("auto", fresh, changed(adapter={"rank": 8}), chosen=True)


def test_auto_in_a_finished_runs_folder_goes_on_with_more_steps(tmp_path):
    run = make_run(tmp_path / "mine", 10, finished=True)
    assert look("auto", run, changed(steps=12), chosen=True) == RunLocation(run, run / "checkpoints" / "step_000010")
    assert look("auto", tmp_path / "new", changed(steps=12)) == RunLocation(
        tmp_path / "new"
    )  # beside, finished is finished


def test_auto_does_not_write_over_a_finished_run_without_checkpoints(tmp_path):
    run = make_run(tmp_path / "mine", finished=True)
    with pytest.raises(ValueError, match="10 steps"):
        look("auto", run, changed(steps=12), chosen=True)


def test_auto_that_starts_anew_says_which_key_of_the_newest_run_differs(tmp_path):
    make_run(tmp_path / "1", 2, config=changed(seed=5))
    make_run(tmp_path / "2", 2, config=changed(adapter={"rank": 8}))
    said = []
    assert look("auto", tmp_path / "3", say=said.append) == RunLocation(tmp_path / "3")
    assert holds(said[0], f"{tmp_path / '2'} ... adapter.rank=8 ... 4")
    assert [holds(line, ANEW) for line in said] == [False, True]
    make_run(tmp_path / "0", 2)
    said.clear()
    assert look("auto", tmp_path / "3", say=said.append).folder == tmp_path / "0"
    assert said == []


# ------------------------------------------------------------------ samples that moved


def test_samples_may_be_at_another_place_for_a_run_that_is_named_and_not_for_one_that_is_looked_for(tmp_path):
    run = make_run(tmp_path / "run", 2)
    config = changed(dataset={"path": "/mnt/demo"})
    assert look(str(run), tmp_path / "new", config) == RunLocation(run, run / "checkpoints" / "step_000002")
    assert look("auto", run, config, chosen=True).checkpoint == run / "checkpoints" / "step_000002"
    said = []
    assert look("auto", tmp_path / "new", config, say=said.append) == RunLocation(tmp_path / "new")
    assert holds(said[0], "dataset.path=data/demo ... /mnt/demo")


@pytest.mark.parametrize(
    "key", ["dataset.path", "dataset.sources.cats.path", "preservation.dataset.path", "preservation.folder"]
)
def test_places_of_samples_are_those_settings(key):
    assert PLACES.fullmatch(key)
    assert not PLACES.fullmatch(f"{key}s")
    assert not PLACES.fullmatch(f"model.{key}")
