"""The loop on small random models, whose losses and gradients are of the size of one."""

import shutil
import threading

import pytest
import torch
from message_helpers import holds
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from train_helpers import CAPTIONS, PRESERVE, adapter, compose, lines, reread, same_tensors, values

from flux2 import adapters
from flux2.weights.loading import load_transformer
from train.checkpoints.checkpoint import checkpoints
from train.config.settings import LoopSettings
from train.objective import objective
from train.objective.objective import Objective
from train.stages.memory import load_config
from train.utils.prefetch import Prefetcher
from train.validation.loss import ValidationSettings

pytest_plugins = ("train_helpers",)


# ------------------------------------------------------------------ what is learned


def test_training_changes_the_adapter_and_nothing_else(train, captured):
    train("run", *PRESERVE, "adapter.dropout=0.1")
    (training,) = captured
    base = load_transformer(load_config(compose(*reread(training.folder))).source, "cpu", torch.float32).state_dict()
    state = training.peft_model.get_base_model().state_dict()
    frozen = {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if ".lora_" not in name}
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], base[name]) for name in base)
    moved = {name: tensor for name, tensor in state.items() if ".lora_B" in name}
    assert all(tensor.abs().max() > 1e-3 for tensor in moved.values())


def test_training_lowers_the_loss_at_fixed_noise(train):
    run = train("run", "steps=20", "validate_every=20", "batch_size=4", "log_every=0")
    before, after = values(run, "validation_loss")
    assert after < 0.9 * before


def test_held_out_samples_are_never_trained_on(train, batches, captured):
    train("run", "steps=12", "validation.held_out=2", "validate_every=12")
    held = {sample.caption for sample in captured[0].validator.chosen}
    assert len(held) == 2
    assert {caption for batch in batches for caption in batch.captions} == set(CAPTIONS) - held


@pytest.fixture
def copies(pictures, tmp_path):
    """The pictures, and a copy of each with a comment in its file."""
    folder, comment = shutil.copytree(pictures, tmp_path / "copies"), PngInfo()
    comment.add_text("Comment", "a copy")
    for i, caption in enumerate(CAPTIONS):
        with Image.open(folder / f"{i}.png") as image:
            image.save(folder / f"copy{i}.png", pnginfo=comment)
        (folder / f"copy{i}.txt").write_text(f"copy of {caption}")
    return folder


def test_a_copy_with_a_comment_is_held_out_with_its_image(train, batches, captured, copies):
    train("run", f"dataset.path={copies}", "steps=12", "validation.held_out=2", "validate_every=12")
    held = {sample.caption for sample in captured[0].validator.chosen}
    assert held == {text for caption in held & set(CAPTIONS) for text in (caption, f"copy of {caption}")}
    assert not held & {caption for batch in batches for caption in batch.captions}


def test_a_run_whose_copies_were_chosen_one_by_one_is_not_resumed_silently(train, copies, monkeypatch):
    overrides = f"dataset.path={copies}", "validation.held_out=3", "validate_every=0"
    split = ValidationSettings.split
    with monkeypatch.context() as earlier:
        earlier.setattr(ValidationSettings, "split", lambda self, contents, *_: split(self, contents))
        run = train("run", *overrides, "steps=1", "checkpoint_every=1")
    (checkpoint,) = checkpoints(run)
    with pytest.raises(ValueError, match=r"samples differ [\s\S]*allow_changed_data=true"):
        train("more", *overrides, "steps=2", f"resume={checkpoint}")


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
        *("adapter", "config.yaml", "data.json", "first_batch.png", "metrics.jsonl", "report.html")
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
