"""Preservation on the sample's own caption without its trigger word, and on the empty prompt."""

import helpers
import pytest
import torch
from loss_helpers import batch_of, stir
from train_helpers import compose, drawn_and_mixed, refusal, refuse_encoders, run_training, values

from flux2 import adapters
from train.config.memory import choice_of
from train.objective import BlankPreservation, ClassPreservation
from train.objective.objective import Inputs, training_loss
from train.objective.timesteps import Uniform
from train.planner.from_config import workload_of
from train.planner.predictor import Planner
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

TRIGGER = "dataset.captions.trigger=trtcrd"


@pytest.mark.parametrize(
    ("caption", "with_word", "without"),
    [
        ("a photo of trtcrd on a beach", "a photo of dog on a beach", "a photo of on a beach"),
        ("trtcrd, the sun", "dog, the sun", "the sun"),
        ("red, trtcrd, blue", "red, dog, blue", "red, blue"),
        ("the sun, trtcrd", "the sun, dog", "the sun"),
        ("trtcrd and trtcrd.", "dog and dog.", "and."),
        ("trtcrds, untrtcrd", "trtcrds, untrtcrd", "trtcrds, untrtcrd"),
        ("a, ,b", "a, ,b", "a, ,b"),
        ("trtcrd", "dog", ""),
    ],
)
def test_the_trigger_word_is_replaced_or_taken_out_as_a_whole_word(caption, with_word, without):
    assert ClassPreservation(trigger="trtcrd", word="dog").replaced(caption) == with_word
    assert ClassPreservation(trigger="trtcrd").replaced(caption) == without


def test_a_word_with_a_backslash_and_a_trigger_with_signs_are_taken_as_they_are():
    assert ClassPreservation(trigger="a+b", word=r"\1").replaced("an a+b, aab") == r"an \1, aab"


def test_a_sample_that_trains_with_the_very_prompt_is_not_held_on_it():
    captions = ["trtcrd, a cup", "a fox", ""]
    kind = ClassPreservation(trigger="trtcrd", word="dog")
    prompts = kind.prompts_for(captions, 0, 0, [0, 1, 2])
    assert prompts == ["dog, a cup", "a fox", ""]
    assert kind.weights(captions, prompts) == [1, 0, 0]
    blank = BlankPreservation(samples=2)
    assert blank.prompts_for(captions, 0, 0, [0, 1, 2]) == ["", ""]
    assert BlankPreservation().weights(captions, ["", "", ""]) == [1, 1, 0]


def test_a_weight_of_zero_leaves_a_sample_out_of_the_mean_and_not_out_of_its_count():
    model = adapters.attach(helpers.transformers("dev")[0], rank=3).train()
    stir(model)
    batch, other = batch_of(2), batch_of(2, start=20).embeddings
    noised, weights = drawn_and_mixed(batch, Uniform(), 0, 0), torch.tensor([0.0, 1.0])
    losses = training_loss(model, Inputs(noised, batch.embeddings, None, other, weights), 1.0, weight=3.0)
    with torch.no_grad():
        prediction = noised.predict(model, other, 1.0)
        base = noised.predict(helpers.transformers("dev")[0], other, 1.0)
    torch.testing.assert_close(losses.preservation, (prediction - base)[1].square().mean() / 2)
    torch.testing.assert_close(losses.total.detach(), losses.flow + 3 * losses.preservation)


# ------------------------------------------------------------------ runs


CARD = "a trtcrd of a red cup, tarot style"
EMBEDDED = ["dataset=demo", "buckets.resolution=64", "batch_size=4", "steps=60", "optimizer.lr=2e-3", "device=cpu"]
OFF = ["log_every=0", "checkpoint_every=0", "sample_every=0", "validate_every=0"]


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        (
            ["preservation=class", "preservation.trigger=trtcrd", "preservation.word=card"],
            CARD.replace("trtcrd", "card"),
        ),
        (["preservation=blank"], ""),
    ],
    ids=["class", "blank"],
)
def test_on_the_embedded_model_the_held_prompt_stays_at_the_base_and_the_trigger_word_is_learned(
    settings, held, captured, cache_folder, tmp_path
):
    def distances(name: str, *more: str) -> dict[str, float]:
        """Mean squared difference of a trained adapter's prediction to the base's with each of two prompts."""
        folders = [f"cache_dir={cache_folder}", f"output_dir={tmp_path / name}", f"sample.prompts=['{held}']"]
        run_training(compose(*EMBEDDED, *OFF, *folders, *more))
        trainer, found = captured[-1], {}
        batch = trainer.loader.micro_batches(0)[0].to("cpu", torch.float32)
        noised = drawn_and_mixed(batch, Uniform(), 3, 3)
        for prompt in (CARD, held):
            text = trainer.loader.embeddings([prompt] * len(batch.captions)).float()
            with torch.no_grad():
                prediction = noised.predict(trainer.peft_model, text, 1.0)
                with adapters.adapters_disabled(trainer.peft_model):
                    base = noised.predict(trainer.peft_model, text, 1.0)
            found[prompt] = (prediction - base).square().mean().item()
        return found

    free, kept = distances("free"), distances("kept", *settings, "preservation.weight=3")
    assert free[held] > 0.5 * free[CARD]  # without preservation the style leaks into the prompt
    assert kept[held] < 0.1 * free[held]
    assert kept[CARD] > 0.8 * free[CARD]


def test_the_replaced_captions_are_encoded_once_and_a_second_run_loads_no_encoder(train, monkeypatch, tmp_path):
    settings = [TRIGGER, "preservation=class", "preservation.word=dog", f"cache_dir={tmp_path / 'cache'}"]
    train("first", *settings)
    refuse_encoders(monkeypatch)
    train("second", *settings)
    with pytest.raises(AssertionError, match="an encoder was loaded"):
        train("other", *settings, "preservation.word=cup")


def test_the_preservation_loss_is_logged_and_starts_at_zero(train):
    run = train("run", TRIGGER, "preservation=class")
    logged = values(run, "preservation_loss")
    assert len(logged) == 4
    assert logged[0] < 1e-10 < logged[-1]


def test_a_trigger_word_that_no_caption_has_is_refused(train):
    with pytest.raises(ValueError, match=r"preservation\.trigger='sks': no caption contains it"):
        train("run", "preservation=class", "preservation.trigger=sks")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("preservation=class", "preservation.trigger=None must be the trigger word of the captions"),
        ("preservation=class preservation.trigger=sks preservation.word=sks-dog", "contains the trigger word sks"),
        ("preservation=class preservation.trigger=sks preservation.word=sks", "contains the trigger word sks"),
        ("preservation=class preservation.trigger=sks preservation.word=5", "preservation.word=5 must be a string"),
        ("preservation=blank preservation.weight=0", "preservation.weight=0 must be a number from 1e-06 to 1e+06"),
        ("preservation=blank preservation.samples=0", "preservation.samples=0 must be an integer from 1"),
    ],
)
def test_a_refused_setting_is_named_with_its_value(words, said):
    assert said in refusal("device=cpu", *words.split()).replace("'", "").replace("null", "None")


def test_the_planner_counts_both_predictions(small):
    def flops(*more):
        run = load_config(compose(*small("batch_size=4", *more)))
        job = workload_of(run, on_gpu=True)
        planner = Planner(job)
        return sum(planner.predict(choice_of(run.composed["memory"])).work.flops.values()), job.rows, job.frozen_rows

    plain, every = flops(), flops("preservation=blank")
    assert (plain[1:], every[1:]) == ((4, []), (8, [4]))
    assert every[0] == pytest.approx(2.25 * plain[0], rel=0.06)
    assert flops("preservation=blank", "preservation.samples=1", "loss.unmasked_prior=1")[1:] == (5, [5])
