import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from train_helpers import compose, values

from flux2 import adapters
from flux2.weights.loading import load_transformer
from train.stages.data import prepare_samples
from train.stages.memory import load_config
from train.validation.loss import TIMES, FixedNoiseLoss, ValidationSettings, chosen_samples

pytest_plugins = ("train_helpers",)


# ------------------------------------------------------------------ which samples


CONTENTS = [f"{i:064x}" for i in range(20)]


def test_held_out_samples_are_not_trained_on_and_the_others_all_are():
    trained, validated = ValidationSettings(held_out=3).split(CONTENTS[:10])
    assert len(validated) == 3
    assert trained == [i for i in range(10) if i not in validated]


def test_without_held_out_samples_all_are_trained_on_and_some_validated():
    trained, validated = ValidationSettings(held_out=0, samples=4).split(CONTENTS[:10])
    assert list(trained) == list(range(10))
    assert len(set(validated)) == 4
    assert sorted(ValidationSettings(samples=99).split(CONTENTS[:5])[1]) == list(range(5))
    assert ValidationSettings(samples=0).split(CONTENTS[:5])[1] == []


@pytest.mark.parametrize("settings", [{"held_out": 5}, {"samples": 5}], ids=["held out", "trained"])
def test_samples_are_chosen_by_their_content_and_the_seed_of_validation_alone(settings):
    def chosen(contents, **more):
        return [contents[i] for i in ValidationSettings(**settings, **more).split(contents)[1]]

    first = chosen(CONTENTS)
    assert chosen(CONTENTS[::-1]) == first  # in the same order too, which decides how a mean is rounded
    assert set(chosen(CONTENTS, seed=1)) != set(first)
    without = [content for content in CONTENTS if content != first[0]]
    assert chosen(without)[:4] == first[1:]
    other = next(content for content in CONTENTS if content not in first)
    assert chosen([content for content in CONTENTS if content != other]) == first


def test_holding_out_everything_is_refused():
    with pytest.raises(ValueError, match=r"validation\.held_out=4.* 4 samples"):
        ValidationSettings(held_out=4).split(CONTENTS[:4])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"held_out": -1}, r"validation\.held_out=-1"),
        ({"samples": 1.5}, r"validation\.samples=1\.5"),
        ({"seed": "x"}, r"validation\.seed='?x'?"),
        ({"seed": 2**63}, r"validation\.seed=9223372036854775808"),
        ({"seed": True}, r"validation\.seed=[Tt]rue"),
        ({"seed": 1.0}, r"validation\.seed=1\.0"),
        *(
            ({"times": times}, r"validation\.times=.*")
            for times in ([], 0.5, "0.5", [0.5, 2], [0.5, 0.5], [0.5, 0.50000001], [True])
        ),
    ],
    ids=str,
)
def test_a_refused_setting_of_validation_is_named_with_its_value(settings, said):
    with pytest.raises(ValueError, match=said):
        ValidationSettings(**settings)


def test_samples_of_one_image_are_held_out_together():
    # four images of five captions each, as a mix of sources or lines of metadata gives them
    contents = [f"{i % 4}" for i in range(20)]
    trained, validated = ValidationSettings(held_out=4).split(contents)
    assert len(validated) == 5
    assert sorted([*trained, *validated]) == list(range(20))
    assert not {contents[i] for i in trained} & {contents[i] for i in validated}
    with pytest.raises(ValueError, match=r"validation\.held_out=16\b.*none of the 20"):
        ValidationSettings(held_out=16).split(contents)


def test_edits_of_an_image_that_is_held_out_are_not_trained():
    contents = [f"image {i}" for i in range(8)]
    # 1 edits the result of 0, and 3 that of 1; 4 and 5 edit an image that is nobody's target
    references = [("first",), (contents[0],), (), (contents[1],), ("style",), ("style",), (), ()]
    for seed in range(20):
        trained, validated = ValidationSettings(held_out=2, seed=seed).split(contents, references)
        shown = {content for i in trained for content in (contents[i], *references[i])}
        assert not shown & {contents[i] for i in validated}
        assert {0, 1, 3} <= set(validated) or not {0, 1, 3} & set(validated)
        assert len(validated) <= 4
    assert any(
        len({4, 5} & set(ValidationSettings(held_out=2, seed=seed).split(contents, references)[1])) == 1
        for seed in range(20)
    )


def test_copies_with_other_metadata_are_held_out_together_and_change_no_other_choice():
    contents, pixels = [f"file {i}" for i in range(12)], [f"image {i % 8}" for i in range(12)]
    references = [()] * 11 + [("image 5",)]  # 11 shows image 3, and edits image 5
    for settings in (ValidationSettings(held_out=3, seed=seed) for seed in range(20)):
        trained, validated = settings.split(contents, references, pixels)
        assert not {image for i in trained for image in (pixels[i], *references[i])} & {pixels[i] for i in validated}
        assert settings.split(contents[:8], (), pixels[:8]) == settings.split(contents[:8])  # as in earlier runs


# ------------------------------------------------------------------ the loss at fixed noise


@pytest.fixture
def measured(small):
    """A model and its loss at fixed noise over two samples."""
    run = load_config(compose(*small()))
    data = prepare_samples(run)
    dataset, prepared = data.samples, data.cached
    chosen = chosen_samples(dataset, prepared, (1, 4))
    return load_transformer(run.source), FixedNoiseLoss(prepared, chosen, seed=0)


def test_the_loss_is_the_same_number_whenever_it_is_measured(measured):
    model, loss = measured
    torch.manual_seed(1)
    first = loss(model, 1.0)
    torch.manual_seed(2)
    assert torch.equal(loss(model, 1.0), first)
    assert (replace(loss, seed=1)(model, 1.0) != first).all()


def test_the_loss_of_a_sample_and_a_time_does_not_depend_on_the_others(measured):
    model, loss = measured
    first = loss(model, 1.0)
    alone = replace(loss, chosen=loss.chosen[1:], times=TIMES[::-1][:3])(model, 1.0)
    assert torch.equal(alone, first[1:].flip(1)[:, :3])
    swapped = replace(loss, chosen=loss.chosen[::-1])(model, 1.0)
    assert torch.equal(swapped, first.flip(0))


def test_the_losses_are_those_of_each_sample_at_each_time(measured):
    model, loss = measured
    found = loss(model, 1.0)
    assert found.shape == (2, len(TIMES))
    for sample, row in zip(loss.chosen, found, strict=True):
        noised, text = loss.inputs(sample, torch.device("cpu"))
        assert torch.equal(noised.times, torch.tensor(TIMES))
        assert torch.equal(text, loss.prepared.embeddings([sample.caption] * len(TIMES)))
        with torch.no_grad():
            errors = (noised.predict(model, text, 1.0) - noised.target).square().mean((1, 2))
        torch.testing.assert_close(row.float(), errors, rtol=1e-5, atol=0)


def test_the_mean_and_that_of_each_time_are_reported(measured):
    _, loss = measured
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 6.0, 7.0]])
    assert loss.report(losses) == {
        "validation_loss": 4.0,
        "validation_loss/0.15": 2.0,
        "validation_loss/0.35": 3.0,
        "validation_loss/0.55": 4.0,
        "validation_loss/0.75": 5.0,
        "validation_loss/0.95": 6.0,
    }
    assert loss.record(losses)["losses"] == losses.tolist()


def test_noise_differs_between_samples_and_times(measured):
    _, loss = measured
    other = replace(loss.chosen[0], content=loss.chosen[1].content)  # the same picture, so that only the noise differs
    targets = [loss.inputs(sample, torch.device("cpu"))[0].target for sample in (loss.chosen[0], other)]
    rows = torch.cat(targets).flatten(1)
    assert len({row.sum().item() for row in rows}) == 2 * len(TIMES)


def test_the_loss_sees_the_adapter_and_leaves_no_gradient(measured):
    model, loss = measured
    before = loss(model, 1.0)
    wrapped = adapters.attach(model, rank=2).eval()
    assert torch.equal(loss(model, 1.0), before)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    assert (loss(model, 1.0) != before).all()
    assert all(parameter.grad is None for parameter in wrapped.parameters())


def test_a_run_that_learns_nothing_has_a_flat_validation_loss(train):
    run = train("run", "optimizer.lr=1e-12", "validate_every=1", "adapter.dropout=0.5", "caption_dropout=0.5")
    assert len(values(run, "validation_loss")) == 5
    assert len(set(values(run, "validation_loss"))) == 1
    assert len(set(values(run))) == 4


def test_runs_of_other_seeds_and_orders_start_from_the_same_validation_loss(train, pictures, tmp_path):
    other = tmp_path / "renamed"
    other.mkdir()
    for i in range(6):  # the same pictures under names that sort the other way
        for end in ("png", "txt"):
            (other / f"{9 - i}.{end}").write_bytes((pictures / f"{i}.{end}").read_bytes())
    settings = ["validation.held_out=3", "validate_every=2", "steps=2", "batch_size=1"]
    runs = [
        train("run", *settings),
        train("other seed", *settings, "seed=5"),
        train("other order", *settings, f"dataset.path={other}"),
    ]
    keys = ["validation_loss", *(f"validation_loss/{time}" for time in TIMES)]
    first, *rest = [[values(run, key) for key in keys] for run in runs]
    assert [one[0] for one in rest[0]] == [one[0] for one in first]  # before training: the base's own
    assert [one[0] for one in rest[1]] == [one[0] for one in first]
    assert rest[0] != first  # and trained on other noise they part
    assert values(train("other validation", *settings, "validation.seed=1"), "validation_loss")[0] != first[0][0]
    record = json.loads((runs[0] / "validation.jsonl").read_text().splitlines()[0])
    assert record["step"] == 0
    assert record["times"] == list(TIMES)
    assert len(record["samples"]) == len(record["losses"]) == 3
    assert np.mean(record["losses"]) == pytest.approx(first[0][0], rel=1e-6)


def test_the_best_checkpoints_are_not_kept_by_a_loss_that_is_not_measured(small):
    given = small("keep_last=1", "keep_best=1", "checkpoint_every=2", "validate_every=2", "validation.samples=0")
    with pytest.raises(ValueError, match=r"keep_best=1.*validation\.samples=0"):
        load_config(compose(*given))
    load_config(compose(*given, "validation.held_out=1"))
