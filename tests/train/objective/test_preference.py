"""Pairs of chosen and rejected images: the dataset, the loss against its formula, and a color that is preferred."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
from loss_helpers import batch_of, masked, stir
from PIL import Image
from train_helpers import CAPTIONS, adapter, compose, draw_picture, lines, refusal, run_training, same_tensors, values

import flux2
from data.buckets import Buckets
from data.cache import MemoryCache
from data.cache.latents import plan_latents
from data.sources import Preference
from data.sources.base import BadData
from data.synthetic.drawings import Drawing, draw
from data.synthetic.probe import read
from flux2 import adapters
from train.config.memory import choice_of
from train.objective import DPO, LogitNormal, Unweighted
from train.objective.noise import NoiseDraw, add_noise
from train.objective.objective import MicroBatch, Objective
from train.planner.from_config import workload_of
from train.planner.predictor import Planner
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)


# ------------------------------------------------------------------ the loss


@pytest.fixture
def model():
    return adapters.attach(helpers.transformers("dev")[0], rank=3).train()


def pairs(count: int, mask: bool = False, references: Sequence[tuple[int, int]] = ()) -> MicroBatch:
    """A micro-batch of pairs; with `mask`, both images of a pair have one."""
    batch, rejected = batch_of(count, references=references), batch_of(count, start=40).latents
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(2))
    batch = replace(masked(batch) if mask else batch, rejected=rejected, weights=torch.tensor([2.0, 0.5])[:count])
    return MicroBatch(batch, NoiseDraw(torch.tensor([0.3, 0.8])[:count], noise))


def objective(**settings: float) -> Objective:
    return Objective(0, LogitNormal(), DPO(**settings), Unweighted(), guidance=1.0)


@pytest.mark.parametrize("references", [(), ((2, 2), (3, 1))], ids=["plain", "edits"])
@pytest.mark.parametrize("mask", [False, True])
def test_the_loss_accuracy_and_margin_are_those_of_the_formula(model, mask, references):
    stir(model)
    micro_batch, base = pairs(2, mask, references), helpers.transformers("dev")[0]
    ours = objective(beta=3.0, unmasked_weight=0.2)
    losses = ours.losses(model, ours.prepare(micro_batch, torch.device("cpu")))
    advantages, given = [], micro_batch.batch.references
    for latents in (micro_batch.batch.latents, micro_batch.batch.rejected):
        noised = add_noise(replace(micro_batch.batch, latents=latents), micro_batch.noise)
        assert noised.tokens.shape[1] == 6 + sum(one.shape[2] * one.shape[3] for one in given)
        m = torch.ones(2, 6, 1) if noised.mask is None else noised.mask.clamp(0.2, 1)
        with torch.no_grad():
            errors = [
                (m * (one - noised.target).square().mean(-1, keepdim=True)).sum((1, 2)) / m.sum((1, 2))
                for one in (noised.predict(kind, micro_batch.batch.embeddings, 1.0) for kind in (base, model))
            ]
        advantages.append(errors[0] - errors[1])
    margins = 3.0 / 2 * (advantages[0] - advantages[1])
    assert margins.abs().min() > 0.01
    expected = (torch.tensor([2.0, 0.5]) * -F.logsigmoid(margins)).mean()
    torch.testing.assert_close(losses.total.detach(), expected)
    accuracy, margin = losses.preference
    assert accuracy == (margins > 0).float().mean()
    torch.testing.assert_close(margin, margins.mean())
    losses.total.backward()
    assert all(one.grad is None for name, one in model.named_parameters() if "lora_" not in name)


def test_a_fresh_adapter_prefers_nothing_and_a_step_prefers_the_chosen_ones(model):
    micro_batch, ours = pairs(2), objective(beta=50.0)
    optimizer = torch.optim.Adam(adapters.adapter_parameters(model), lr=1e-2)
    found = []
    for _ in range(6):
        losses = ours.losses(model, ours.prepare(micro_batch, torch.device("cpu")))
        found.append([losses.flow.item(), *(value.item() for value in losses.preference)])
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert found[0][0] == pytest.approx(math.log(2) * 1.25, rel=1e-4)  # the weights are 2 and 0.5
    assert found[-1][0] < 0.7 * found[0][0]
    assert found[-1][1] == 1
    assert found[-1][2] > 0.5 > abs(found[0][2])


# ------------------------------------------------------------------ the dataset


@pytest.fixture
def votes(tmp_path):
    """A folder of two pairs; the rejected images have another format."""
    folder = tmp_path / "votes"
    for name in ("chosen", "rejected"):
        (folder / name).mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS[:3]):
        draw_picture(number, (48, 48)).save(folder / "chosen" / f"{number}.png")
        draw_picture(number + 10, (48, 48)).save(folder / "rejected" / f"{number}.bmp")
        (folder / "chosen" / f"{number}.txt").write_text(caption)
    return folder


def test_the_images_of_a_pair_are_found_by_name_and_share_caption_and_loss_weight(votes):
    samples = Preference(votes, loss_weight=0.5)
    assert [Path(sample.rejected.name).name for sample in samples] == ["0.bmp", "1.bmp", "2.bmp"]
    assert [sample.caption for sample in samples] == CAPTIONS[:3]
    assert {(sample.references, sample.loss_weight) for sample in samples} == {((), 0.5)}
    assert len(samples[0].pictures) == 2


def test_a_pair_of_two_sizes_or_without_a_rejected_image_is_bad(votes):
    draw_picture(3, (48, 32)).save(votes / "rejected" / "1.bmp")
    with pytest.raises(BadData, match=r"1\.png has 48 x 48 pixels, and the rejected .*1\.bmp has 48 x 32: crop them"):
        Preference(votes)
    (votes / "rejected" / "1.bmp").unlink()
    with pytest.raises(BadData, match=r"1\.png has no image of its name in \S*rejected\n"):
        Preference(votes)
    with pytest.raises(ValueError, match=r"rejected_folder=.*other"):
        Preference(votes, rejected_folder="other")


@pytest.fixture
def edits(votes):
    """The same pairs as edits of source/x.png and pose/x.png, which has another size."""
    for name, start, size in (("source", 20, (48, 48)), ("pose", 25, (32, 48))):
        (votes / name).mkdir()
        for number in range(3):
            draw_picture(start + number, size).save(votes / name / f"{number}.png")
    return votes


def test_the_references_of_a_pair_are_found_by_name_and_are_those_of_both_images(edits):
    samples = Preference(edits, reference_folders=["source", "pose"])
    assert [[Path(one.name).parent.name for one in sample.references] for sample in samples] == [["source", "pose"]] * 3
    assert [Path(sample.rejected.name).parent.name for sample in samples] == ["rejected"] * 3
    plan = plan_latents(MemoryCache(), samples, Buckets(48, flip=True), "vae", 48**2)
    for variant in (variant for entry in plan.entries for variant in entry.variants):
        kinds = [plan.work[key] for key in (variant.key, variant.rejected_key, *variant.reference_keys)]
        assert [one.kind for one in kinds] == ["target", "target", "reference", "reference"]
        assert len({one.cut.mirrored for one in kinds}) == 1
    # the source may be what is rejected, and as many references as without a rejected image are allowed
    assert len(Preference(edits, rejected_folder="source", reference_folders=["pose"] * 10)[0].references) == 10


def test_a_pair_without_a_reference_or_with_one_image_twice_is_bad(edits):
    (edits / "source" / "1.png").unlink()
    with pytest.raises(BadData, match=r"1 of 3 .*\n.*chosen/1\.png has no image of its name in \S*source\n"):
        Preference(edits, reference_folders=["source"])
    with pytest.raises(ValueError, match=r"reference_folders=.*other"):
        Preference(edits, reference_folders=["other"])
    with pytest.raises(ValueError, match=r"dataset\.reference_folders='source' is str: it must be a list"):
        Preference(edits, reference_folders="source")
    with pytest.raises(BadData, match=r"chosen/0\.png is its own rejected image"):
        Preference(edits, rejected_folder="chosen")


def test_both_images_of_a_pair_are_cropped_and_mirrored_alike(votes):
    for name in ("chosen", "rejected"):
        for file in (votes / name).glob("*.[pb][nm][gp]"):
            draw_picture(int(file.stem) + (name == "rejected"), (96, 48)).save(file)
    buckets = Buckets(48, max_aspect=1.0, random_crops=3, flip=True)
    plan = plan_latents(MemoryCache(), Preference(votes), buckets, "vae", 48**2)
    for entry in plan.entries:
        assert len(entry.variants) > 2
        for variant in entry.variants:
            chosen, rejected = plan.work[variant.key], plan.work[variant.rejected_key]
            assert (chosen.size, chosen.cut, chosen.kind) == (rejected.size, rejected.cut, rejected.kind)
            assert chosen.picture is not rejected.picture
        assert {one.rejected_key for one in entry.variants} <= entry.keys


# ------------------------------------------------------------------ runs


def test_a_run_logs_accuracy_and_margin_and_goes_on_to_the_bit(train, votes):
    settings = ["dataset=preference", f"dataset.path={votes}", "loss=dpo", "loss.beta=100", "checkpoint_every=2"]
    settings += ["gradient_accumulation=2", "batch_size=1", "adapter.dropout=0.1", "preservation=blank"]
    whole = train("whole", *settings)
    assert values(whole, "loss")[0] == pytest.approx(math.log(2), abs=0.3)  # dropout differs from the base already
    assert len(values(whole, "preference_accuracy")) == len(values(whole, "preference_margin")) == 4
    start = f"resume={whole / 'checkpoints' / 'step_000002'}"
    rest = train("rest", *settings, start)
    assert lines(rest) == [line for line in lines(whole) if line["step"] > 2]
    assert same_tensors(adapter(rest), adapter(whole))
    draw_picture(30, (48, 48)).save(votes / "rejected" / "2.bmp")
    with pytest.raises(ValueError, match=r"samples.*1 changed.*2\.png"):
        train("other", *settings, start)


def test_a_run_on_edits_validates_samples_and_goes_on_to_the_bit(train, edits):
    settings = ["dataset=preference", f"dataset.path={edits}", "dataset.reference_folders=[source,pose]", "loss=dpo"]
    settings += ["loss.beta=100", "checkpoint_every=2", "validate_every=2", "reference_dropout=0.4", "sample_every=4"]
    settings += ["sample.prompts=[a red cup]", f"sample.references=[[{edits}/source/0.png]]", "sample.steps=2"]
    whole = train("whole", *settings)
    assert (whole / "samples" / "step_000004.png").is_file()
    assert len(values(whole, "preference_margin")) == 4
    assert len(values(whole, "validation_loss")) == 3
    start = f"resume={whole / 'checkpoints' / 'step_000002'}"
    rest = train("rest", *settings, start)
    assert lines(rest) == [line for line in lines(whole) if line["step"] > 2]
    assert same_tensors(adapter(rest), adapter(whole))
    without = train("without", *[one for one in settings if not one.startswith(("dataset.ref", "reference_"))])
    assert values(without) != values(whole)
    draw_picture(30, (32, 48)).save(edits / "pose" / "2.png")
    with pytest.raises(ValueError, match=r"samples.*1 changed.*2\.png"):
        train("other", *settings, start)


def test_on_the_embedded_model_pairs_that_prefer_red_over_blue_move_the_color_of_the_probe(tmp_path, cache_folder):
    folder = tmp_path / "pairs"
    for name, color in (("chosen", "red"), ("rejected", "blue")):
        (folder / name).mkdir(parents=True)
        for shape in ("cup", "star", "heart", "fish", "bell", "key"):
            draw(Drawing(shape, color, "white", "large")).save(folder / name / f"{shape}.png")
            (folder / "chosen" / f"{shape}.txt").write_text(f"a large {shape} on a white background")
    settings = ["dataset=preference", f"dataset.path={folder}", "loss=dpo", "loss.beta=200", "batch_size=4", "steps=40"]
    off = ["log_every=10", "checkpoint_every=0", "sample_every=0", "validate_every=0", "sample.prompts=[]"]
    places = [f"output_dir={tmp_path / 'run'}", f"cache_dir={cache_folder}", "device=cpu", "optimizer.lr=1e-3"]
    run = run_training(compose(*settings, *off, *places)).parent
    assert values(run, "preference_accuracy")[-1] == 1
    pipe = flux2.load("tiny", device="cpu")

    def colors() -> Counter:
        """Colors that the probe reads in images of two shapes of the pairs and of two others."""
        prompts = [f"a large {shape} on a white background" for shape in ("cup", "star", "moon", "crown")]
        images = [pipe.generate(prompt, seed=seed, steps=8) for prompt in prompts for seed in range(3)]
        return Counter(read(image if isinstance(image, Image.Image) else image[0]).color for image in images)

    before = colors()
    pipe.load_adapter(run)
    after = colors()
    assert before["red"] <= 3
    assert after["red"] >= 8
    assert after["blue"] == 0


def test_on_the_embedded_model_edits_that_prefer_red_turn_new_references_red(tmp_path, cache_folder):
    folder = tmp_path / "edits"
    colors = {"cup": "green", "star": "yellow", "heart": "purple", "fish": "pink", "bell": "orange", "key": "brown"}
    for name in ("source", "chosen", "rejected"):
        (folder / name).mkdir(parents=True)
        for shape, color in colors.items():
            shown = {"source": color, "chosen": "red", "rejected": "blue"}[name]
            draw(Drawing(shape, shown, "white", "large")).save(folder / name / f"{shape}.png")
    settings = ["dataset=preference", f"dataset.path={folder}", "dataset.reference_folders=[source]", "loss=dpo"]
    settings += ["dataset.prompt=change its color", "loss.beta=200", "batch_size=2", "steps=40", "optimizer.lr=1e-3"]
    off = ["log_every=10", "checkpoint_every=0", "sample_every=0", "validate_every=0", "sample.prompts=[]"]
    places = [f"output_dir={tmp_path / 'run'}", f"cache_dir={cache_folder}", "device=cpu"]
    run = run_training(compose(*settings, *off, *places)).parent
    pipe = flux2.load("tiny", device="cpu")
    given = [(shape, ground) for shape in ("star", "moon", "crown") for ground in ("white", "blue")]

    def edited() -> list[tuple[str, str, str]]:
        references = [draw(Drawing(shape, "purple", ground, "large")) for shape, ground in given]
        images = [pipe.generate("change its color", references=[one], seed=3, steps=8)[0] for one in references]
        return [(one.shape, one.background, one.color) for one in map(read, images)]

    assert sum(color == "red" for *_, color in edited()) <= 1
    pipe.load_adapter(run)
    after = edited()
    assert [tuple(one) for *one, _ in after] == given
    assert sum(color == "red" for *_, color in after) >= 5


# ------------------------------------------------------------------ settings


def test_the_dataset_and_the_loss_need_each_other(train, votes):
    with pytest.raises(ValueError, match=r"dataset=preference has rejected images, which only loss=dpo and target"):
        train("mse", "dataset=preference", f"dataset.path={votes}")
    with pytest.raises(ValueError, match=r"loss=dpo needs a rejected image for every sample, and 6 of 6 have none"):
        train("dpo", "loss=dpo")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("loss.beta=0", "loss.beta=0 must be a number from 0.001 to 1e+09"),
        ("loss.unmasked_prior=1", "loss.unmasked_prior=1 has no effect with loss=dpo"),
        ("model=klein_base_4b target=contrastive", "loss=dpo with target=contrastive"),
        ("target=slider target.positive=a target.negative=b", "loss=dpo with target=slider"),
        ("adapter.init=/x adapter.init_mode=frozen", "adapter.init_mode=frozen with loss=dpo"),
        ("preservation=prior preservation.prompts=[a]", "loss=dpo with preservation=prior"),
    ],
)
def test_a_refused_setting_is_named_with_its_value(words, said):
    assert said in refusal("device=cpu", "loss=dpo", *words.split())


def test_the_planner_counts_both_images_with_and_without_the_adapter(small):
    def planned(*more):
        run = load_config(compose(*small("batch_size=4", *more)))
        job = workload_of(run, on_gpu=True)
        work = Planner(job).predict(choice_of(run.composed["memory"])).work
        tokens.append(job.shape.tokens)
        return (job.rows, job.held, job.frozen_rows), sum(work.flops.values())

    tokens: list[int] = []
    (rows, plain), (pair_rows, paired) = planned(), planned("loss=dpo")
    places = ["dataset=preference", "dataset.path=/votes", "dataset.reference_folders=[source,pose]"]
    planned("loss=dpo", *places)
    assert tokens[1] - tokens[0] == 0
    assert tokens[2] - tokens[0] == 2 * 9  # references of 48 x 48 pixels
    assert (rows, pair_rows) == ((4, 0, []), (8, 4, [8]))
    assert paired == pytest.approx(2 * 1.25 * plain, rel=0.06)
