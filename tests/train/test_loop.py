"""The loop on small random models, whose losses and gradients are of the size of one."""

import json
import re
import signal
import threading

import pytest
import torch
from message_helpers import holds
from train_helpers import (
    CAPTIONS,
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

from flux2 import adapters
from flux2.weights.loading import load_transformer
from train.checkpoints.checkpoint import checkpoints
from train.config.settings import LoopSettings
from train.objective import objective
from train.objective.objective import Objective
from train.stages.memory import load_config
from train.utils.prefetch import Prefetcher
from train.utils.signals import Interrupted

pytest_plugins = ("train_helpers", "train_processes")

PRESERVE = ["preservation=base", "preservation.prompts=[a fox, the cup, a card]", "preservation.samples=1"]
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


@pytest.fixture
def batches(monkeypatch):
    """Every micro-batch that is trained on."""
    seen = []
    add_noise = objective.add_noise

    def keep(batch, *rest):
        seen.append(batch)
        return add_noise(batch, *rest)

    monkeypatch.setattr(objective, "add_noise", keep)
    return seen


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


def test_a_larger_batch_is_another_run(train, reference):
    assert values(train("one", "batch_size=1", "steps=1"))[0] != values(reference())[0]


def test_two_processes_train_as_one_does(server, pictures, tmp_path):
    """Real processes, through the entry file; what they train is of the size called tiny, with random weights.

    In the two, half of the blocks stream.
    """
    arguments = [
        *("model=tiny", f"model.path={random_tiny_folder(tmp_path)}", "model.resolution=48", "dataset=folder"),
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
    files = ["adapter", "checkpoints", "command.txt", "config.yaml", "data.json", "metrics.jsonl", "report.html"]
    assert sorted(path.name for path in two.iterdir()) == [*files, "validation.jsonl"]
    state = json.loads((two / "checkpoints" / "step_000002" / "state.json").read_text())
    assert (state["step"], state["base"], state["images_per_step"]) == (2, "tiny", 4)


def random_tiny_folder(tmp_path):
    folder = tmp_path / "random tiny"
    folder.mkdir()
    return random_tiny(folder)


# ------------------------------------------------------------------ what is learned


def test_training_changes_the_adapter_and_nothing_else(train, captured):
    train("run", *PRESERVE, "adapter.dropout=0.1")
    (training,) = captured
    base = load_transformer(load_config(compose(*reread(training))).source, "cpu", torch.float32).state_dict()
    state = training.peft_model.get_base_model().state_dict()
    frozen = {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if ".lora_" not in name}
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], base[name]) for name in base)
    moved = {name: tensor for name, tensor in state.items() if ".lora_B" in name}
    assert all(tensor.abs().max() > 1e-3 for tensor in moved.values())


def reread(training):
    """The overrides of the run's model, from its own configuration."""
    file = (training.folder / "config.yaml").read_text()
    return [f"model.{key}={re.search(rf'^  {key}: (.+)$', file, re.M)[1]}" for key in ("name", "path")]


def test_training_lowers_the_loss_at_fixed_noise(train):
    run = train("run", "steps=20", "validate_every=20", "batch_size=4", "log_every=0")
    before, after = values(run, "validation_loss")
    assert after < 0.9 * before


def test_held_out_samples_are_never_trained_on(train, batches, captured):
    train("run", "steps=12", "validation.held_out=2", "validate_every=12")
    held = {sample.caption for sample in captured[0].validator.chosen}
    assert len(held) == 2
    assert {caption for batch in batches for caption in batch.captions} == set(CAPTIONS) - held


def test_each_step_but_the_first_is_prepared_ahead_in_one_thread_and_none_after_the_last(train, monkeypatch):
    seen, prepare = [], Objective.micro_batches

    def noted(self, loader, step):
        seen.append((step, threading.current_thread().name))
        return prepare(self, loader, step)

    begun, begin = [], Prefetcher.begin
    monkeypatch.setattr(Objective, "micro_batches", noted)
    monkeypatch.setattr(Prefetcher, "begin", lambda self, step: [begun.append(step), begin(self, step)])
    train("run")
    assert begun == [1, 2, 3]
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert {name for _, name in seen} == {"prefetch_0"}


def test_dropped_captions_train_on_the_empty_prompt(train, batches):
    train("run", "steps=3", "caption_dropout=1.0")
    assert {caption for batch in batches for caption in batch.captions} == {""}
    assert len({batch.embeddings.sum().item() for batch in batches}) == 1


def test_the_guidance_that_a_model_takes_is_the_one_of_the_settings_or_its_own(train, reference):
    own, klein = values(reference()), values(reference(kind="klein"))
    assert values(train("same", "guidance=1.0", "steps=2")) == own[:2]
    assert values(train("other", "guidance=3.0", "steps=1"))[0] != own[0]
    assert values(train("klein", "guidance=3.0", "steps=2", kind="klein")) == klein[:2]  # which takes none


def test_a_seed_changes_all_draws(train, reference):
    assert values(train("other", "seed=1", "steps=1"))[0] != values(reference())[0]


# ------------------------------------------------------------------ the step


def test_the_logged_rate_follows_the_schedule(train):
    run = train("run", "schedule=cosine", "schedule.warmup_steps=1", "optimizer.lr=0.5", "steps=5")
    wave = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * done / 4)).item()) for done in range(4)]
    assert values(run, "lr") == pytest.approx([0.25, *(0.5 * value for value in wave)])


def test_the_gradient_is_clipped_to_its_norm_and_logged_before(train, captured, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *rest):
        gradients = [parameter.grad.flatten() for group in self.param_groups for parameter in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr("train.config.run_config.try_out", lambda *arguments: None)
    clipped = train("clipped", "max_grad_norm=0.01", "steps=2")
    assert norms == pytest.approx([0.01] * 2, rel=1e-3)
    assert all(value > 0.02 for value in values(clipped, "grad_norm"))
    norms.clear()
    free = train("free", "max_grad_norm=0", "steps=2")
    assert norms == pytest.approx(values(free, "grad_norm"), rel=1e-5)
    assert values(free, "grad_norm")[0] == values(clipped, "grad_norm")[0]


def test_bfloat16_is_near_to_float32_and_keeps_the_adapter_in_float32(reference, train, captured):
    exact = reference()
    captured.clear()
    near = train("near", "precision=bf16", "steps=2")
    assert values(near)[0] == pytest.approx(values(exact)[0], rel=0.02)
    assert values(near)[0] != values(exact)[0]
    kinds = {name: parameter.dtype for name, parameter in captured[0].peft_model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize(("precision", "kind"), [("fp32", False), ("bf16", True)])
def test_products_of_matrices_are_in_bfloat16_only_with_a_bfloat16_base(train, monkeypatch, precision, kind):
    seen = []
    training_loss = objective.training_loss

    def spy(*arguments):
        seen.append(torch.is_autocast_enabled("cpu"))
        return training_loss(*arguments)

    monkeypatch.setattr(objective, "training_loss", spy)
    train("run", f"precision={precision}", "steps=2")
    assert seen == [kind, kind]


def test_validation_measures_the_adapter_as_it_is_used_without_dropout(train, captured, small):
    run = train("run", "adapter.dropout=0.8", "validate_every=4")
    model = load_transformer(load_config(compose(*small())).source)
    before = captured[0].validator(model, 1.0).mean().item()
    adapters.load(model, run)
    after = captured[0].validator(model, 1.0).mean().item()
    assert values(run, "validation_loss") == pytest.approx([before, after], rel=1e-5)
    assert abs(after - before) > 1e-3


def test_recomputing_activations_changes_no_loss(train):
    def curve(policy, *more):
        return lines(train(policy, f"memory.checkpointing={policy}", "adapter.dropout=0.2", "steps=3", *more))

    none = curve("none")
    assert none == curve("full")
    assert none == curve("selective")
    assert none == curve("budget", "memory.budget_gb=0.001")


# ------------------------------------------------------------------ when something is due


def test_intervals_say_when_and_the_end_is_always_shown(train):
    run = train(
        "run", "steps=5", "log_every=2", "checkpoint_every=2", "validate_every=3", "sample_every=4",
        "sample.prompts=[a red cup]", "sample.steps=1",
    )  # fmt: skip
    assert [(line["step"], "loss" in line, "validation_loss" in line) for line in lines(run)] == [
        (0, False, True),
        (2, True, False),
        (3, False, True),
        (4, True, False),
        (5, True, True),
    ]
    assert [path.name for path in checkpoints(run)] == ["step_000002", "step_000004", "step_000005"]
    grids = sorted(path.name for path in (run / "samples").iterdir())
    assert grids == ["step_000000.png", "step_000004.png", "step_000005.png"]


def test_an_interval_of_zero_is_off(train):
    run = train("run", "log_every=0", "sample.prompts=[a red cup]")
    assert (run / "metrics.jsonl").read_text() == ""
    assert sorted(path.name for path in run.iterdir()) == [
        *("adapter", "config.yaml", "data.json", "metrics.jsonl", "report.html")
    ]


def test_looking_at_a_run_does_not_change_it(train):
    settings = ["adapter.dropout=0.3", "caption_dropout=0.3"]
    plain = train("plain", *settings)
    seen = train(
        "seen", *settings, "validate_every=1", "sample_every=1", "checkpoint_every=1",
        "sample.prompts=[a red cup]", "sample.steps=1",
    )  # fmt: skip
    assert values(seen) == values(plain)
    assert same_tensors(adapter(seen), adapter(plain))


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"steps": True},
        {"gradient_accumulation": 0},
        {"log_every": -1},
        {"seed": "x"},
        {"max_grad_norm": -1},
        {"max_grad_norm": float("nan")},
        {"guidance": "high"},
    ],
    ids=str,
)
def test_a_refused_setting_of_the_loop_is_named_with_its_value(settings):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        LoopSettings(**settings)
    ((key, value),) = settings.items()
    assert holds(str(error.value), f"{key}={value}")
