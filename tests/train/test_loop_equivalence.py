"""Runs with the same losses: resumed, from full caches, cut into other batches, and in two processes."""

import json
import signal

import pytest
import torch
from message_helpers import holds
from train_helpers import (
    PRESERVE,
    adapter,
    ask_to_stop,
    compose,
    lines,
    random_tiny,
    refuse_encoders,
    run_training,
    same_tensors,
    values,
)

from train.objective import objective
from train.utils.signals import Interrupted

pytest_plugins = ("train_helpers", "train_processes")

# everything that draws numbers or keeps state, at once
EVERYTHING = [
    "ema_decay=0.8",
    "adapter.dropout=0.3",
    "caption_dropout=0.5",
    *PRESERVE,
    "gradient_accumulation=2",
    "schedule=cosine",
    "schedule.warmup_steps=2",
    "validate_every=2",
    "validation.held_out=1",
]


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("way", "kind", "settings"),
    [
        ("stopped", "dev", EVERYTHING),
        ("killed", "klein", [*EVERYTHING, "precision=bf16"]),
        ("stopped", "klein", ["optimizer=adamw_8bit", "optimizer.lr=1e-2", "memory.checkpointing=none"]),
        ("killed", "dev", []),
    ],
    ids=["everything", "everything in bfloat16", "8-bit optimizer", "plain"],
)
def test_a_run_that_stopped_and_goes_on_has_the_losses_of_one_that_did_not(
    train, at_step, batches, way, kind, settings
):
    settings = [*settings, "steps=5"]
    whole = train("whole", *settings, kind=kind)
    assert len({batch.latents.shape for batch in batches}) == 2  # both buckets took part
    if way == "stopped":
        at_step(2, ask_to_stop())
        with pytest.raises(Interrupted, match=r"SIGTERM.* step 3\b.*resume="):
            train("cut", *settings, kind=kind)
    else:

        def die():
            raise RuntimeError("power cut")

        at_step(4, die)
        with pytest.raises(RuntimeError, match="power cut"):
            train("cut", *settings, "checkpoint_every=3", kind=kind)
        assert values_of_steps(whole.parent / "cut")[-1] == 4
    cut = train("cut", *settings, "resume=auto", kind=kind)
    assert lines(cut) == lines(whole)
    assert values_of_steps(cut) == list(dict.fromkeys(values_of_steps(cut)))  # each step once
    assert values_of_steps(cut)[-5:] == [1, 2, 3, 4, 5]
    assert len(set(values(whole))) == 5
    assert same_tensors(adapter(cut), adapter(whole))


def values_of_steps(folder):
    return [line["step"] for line in lines(folder)]


def test_a_run_can_be_stopped_and_go_on_more_than_once(train, reference, at_step, tmp_path):
    whole = reference("steps=5")
    for step in (0, 2, 3):
        at_step(step, ask_to_stop(signal.SIGINT))
        with pytest.raises(Interrupted):
            train("cut", "steps=5", *(["resume=auto"] if step else []))
    cut = train("cut", "steps=5", f"resume={tmp_path / 'cut'}")
    assert lines(cut) == lines(whole)


def test_a_half_written_last_line_and_what_came_after_the_checkpoint_are_dropped(train, reference, at_step, tmp_path):
    whole = reference("steps=5")
    at_step(2, ask_to_stop())
    with pytest.raises(Interrupted):
        train("cut", "steps=5")
    file = tmp_path / "cut" / "metrics.jsonl"
    with file.open("a") as metrics:
        metrics.write('{"step": 4, "loss": 17}\n{"step": 5, "lo')
    cut = train("cut", "steps=5", "resume=auto")
    assert lines(cut) == lines(whole)


def test_the_branch_of_an_older_checkpoint_has_the_losses_from_there_on(train, reference):
    whole = reference("steps=5", "checkpoint_every=2")
    branch = train("branch", "steps=5", f"resume={whole / 'checkpoints' / 'step_000002'}")
    assert lines(branch) == lines(whole)[2:]
    assert same_tensors(adapter(branch), adapter(whole))


def test_a_finished_run_is_trained_for_longer(train, reference):
    whole = reference("steps=5")
    first = train("cut", "steps=3", "checkpoint_every=3")
    longer = train("cut", "steps=5", f"resume={first}")
    assert lines(longer) == lines(whole)


def test_another_configuration_is_not_resumed(train):
    run = train("run", "checkpoint_every=2")
    for change, said in (
        ("adapter.rank=2", "adapter.rank=4 ... 2"),
        ("model.name=small_klein", "model.name=small_dev ... small_klein"),
    ):
        with pytest.raises(ValueError, match="configuration") as error:
            train("run", f"resume={run}", change, "steps=9")
        assert holds(str(error.value), said)
    with pytest.raises(ValueError, match=rf"samples .*{run}\b.* 6 .*24 new"):
        train("run", f"resume={run}", "dataset.path=data/demo", "steps=9")
    with pytest.raises(ValueError, match=rf"{run}\b.*resume="):
        train("run")


# ------------------------------------------------------------------ the cache


def test_filled_caches_give_the_same_losses_and_load_neither_encoder(train, tmp_path, monkeypatch):
    settings = [f"cache_dir={tmp_path / 'own_cache'}", "caption_dropout=0.5", *PRESERVE]
    empty = train("empty", *settings)
    refuse_encoders(monkeypatch)
    filled = train("filled", *settings)
    assert lines(filled) == lines(empty)
    assert same_tensors(adapter(filled), adapter(empty))
    with pytest.raises(AssertionError, match="an encoder was loaded"):
        train("other", f"cache_dir={tmp_path / 'other_cache'}")


# ------------------------------------------------------------------ how a batch is cut


def test_the_draws_are_the_same_however_a_batch_is_cut(train, batches, monkeypatch):
    noised = []
    add_noise = objective.add_noise

    def keep(*arguments):
        noised.append(add_noise(*arguments))
        return noised[-1]

    monkeypatch.setattr(objective, "add_noise", keep)
    drawn = []
    for i, cut in enumerate((4, 2, 1)):
        batches.clear(), noised.clear()
        train(f"cut {i}", f"batch_size={cut}", f"gradient_accumulation={4 // cut}", "caption_dropout=0.5", "steps=3")
        drawn.append(
            {
                "order": [index for batch in batches for index in batch.indices],
                "captions": [caption for batch in batches for caption in batch.captions],
                "positions": [position for batch in batches for position in batch.positions],
                "times": [time for one in noised for time in one.times.tolist()],
                "targets": [target.sum().item() for one in noised for target in one.target],
            }
        )
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0]["positions"] == [0, 1, 2, 3] * 3
    assert "" in drawn[0]["captions"]
    assert len(set(drawn[0]["times"])) == 12


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_accumulated_micro_batches_train_as_one_batch_does(train, kind):
    settings = ["optimizer.lr=1e-3", "caption_dropout=0.3", *PRESERVE, "preservation.samples=4"]
    one = train("one", "batch_size=4", *settings, kind=kind)
    two = train("two", "batch_size=2", "gradient_accumulation=2", *settings, kind=kind)
    for key in ("loss", "preservation_loss", "grad_norm"):
        assert values(two, key) == pytest.approx(values(one, key), rel=2e-5, abs=1e-9)
    assert values(two)[0] == pytest.approx(values(one)[0], rel=1e-6)
    for name, tensor in adapter(one).items():
        torch.testing.assert_close(adapter(two)[name], tensor, atol=1e-5, rtol=1e-3)


def test_smaller_buckets_have_more_images_of_as_many_tokens_however_a_batch_is_cut(train, batches, at_step):
    sizes = ["buckets.resolution=[16,48]", "buckets.each_resolution=true", "text_encoder.length=4", "batch_by=tokens"]
    settings = [*sizes, "steps=9", "optimizer.lr=1e-3", "caption_dropout=0.3"]
    whole = train("whole", "batch_size=2", *settings)
    # 2 images of 9 tokens and 4 of text have as many as 4 of 1 token, or 2 of 8; a text token counts as 1.25
    found = {(*batch.latents.shape[2:], len(batch.indices)) for batch in batches}
    assert found == {(3, 3, 2), (2, 4, 2), (1, 1, 4)}
    at_step(4, ask_to_stop())
    with pytest.raises(Interrupted):
        train("cut", "batch_size=2", *settings)
    assert lines(train("cut", "batch_size=2", *settings, "resume=auto")) == lines(whole)
    with pytest.raises(ValueError, match="batch_by='tokens' there, 'images' here"):
        train("cut", "batch_size=2", *settings, "batch_by=images", f"resume={whole}", "steps=10")
    with pytest.raises(ValueError, match="batch_by='pixels' must be one of images, tokens"):
        train("other", "batch_by=pixels")


def test_a_larger_batch_is_another_run(train, reference):
    assert values(train("one", "batch_size=1", "steps=1"))[0] != values(reference())[0]


@pytest.mark.slow
def test_two_processes_train_as_one_does(server, pictures, tmp_path):
    """Real processes, through the entry file; what they train is of the size called tiny, with random weights.

    In the two, half of the blocks stream.
    """
    arguments = [
        *("model=tiny", f"model.path={random_tiny(tmp_path / 'random tiny')}", "model.resolution=48", "dataset=folder"),
        f"dataset.path={pictures}",
        *(f"cache_dir={tmp_path / 'cache'}", "steps=3", "log_every=1", "checkpoint_every=2", "sample_every=0"),
        *("validate_every=3", "validation.samples=1", "adapter.rank=2", "optimizer.lr=1e-3", "caption_dropout=0.3"),
        *("preservation=base", "preservation.prompts=[a red cup]", "preservation.samples=4"),
    ]
    two = tmp_path / "two"
    cut = ["batch_size=1", "gradient_accumulation=2", "memory.offload_blocks=0.5", f"output_dir={two}"]
    first, second = server.start_two(*arguments, *cut)
    said = [process.out.read_text() for process in (first, second) if process.wait() == 0]
    assert len(said) == 2, first.out.read_text()
    assert "processes: 2" in said[0]
    assert [text.count("trained parameters") for text in said] == [1, 0]  # one of them speaks
    one = run_training(compose(*arguments, "batch_size=4", f"output_dir={tmp_path / 'one'}")).parent
    assert [line["step"] for line in lines(two)] == [line["step"] for line in lines(one)] == [0, 1, 2, 3]
    for key in ("loss", "preservation_loss", "grad_norm", "validation_loss"):
        assert values(two, key) == pytest.approx(values(one, key), rel=1e-4, abs=1e-9)
    assert values(two)[0] == pytest.approx(values(one)[0], rel=1e-6)
    for name, tensor in adapter(one).items():
        torch.testing.assert_close(adapter(two)[name], tensor, atol=2e-5, rtol=1e-2)
    files = ["adapter", "checkpoints", "command.txt", "config.yaml", "data.json", "first_batch.png", "metrics.jsonl"]
    assert sorted(path.name for path in two.iterdir()) == [*files, "report.html", "validation.jsonl"]
    assert (two / "first_batch.png").read_bytes() == (one / "first_batch.png").read_bytes()
    state = json.loads((two / "checkpoints" / "step_000002" / "state.json").read_text())
    assert (state["step"], state["base"], state["images_per_step"]) == (2, "tiny", 4)
