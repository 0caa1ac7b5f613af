"""Image-to-image from picture files to the loss, as diffusers makes it of the same files; the relighting experiment."""

import json
from copy import deepcopy
from dataclasses import replace

import datasets
import helpers
import pytest
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from train_helpers import adapter, ask_to_stop, compose, draw_picture, execute, launch, lines, run_training, values

from flux2.models.positions import from_tokens
from flux2.models.variants import VARIANTS
from train.objective import objective
from train.stages.memory import load_config
from train.utils.signals import Interrupted

pytest_plugins = ("train_helpers",)

# of the references; the last is no multiple of 16 and loses its edges
SIZES = [(32, 64), (64, 48), (55, 37)]


@pytest.fixture
def edits(tmp_path):
    """`edits(references)`: a folder of two wide pictures, each an edit of that many pictures of different sizes."""

    def write(references):
        rows = []
        for i, caption in enumerate(("a red fox", "the blue cup")):
            names = [f"{i}_{j}.png" for j in range(references)]
            for j, name in enumerate(names):
                draw_picture(10 * i + j, SIZES[j]).save(tmp_path / name)
            draw_picture(100 + i, (64, 32)).save(tmp_path / f"{i}.png")
            rows.append({"file_name": f"{i}.png", "text": caption, "references": names})
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path, rows

    return write


def published_sample(kind, folder, row):
    """Latents of a row's picture and of its references, and its caption's embeddings, from diffusers' pipeline."""
    parts, text = helpers.reference_parts(kind), helpers.TEXTS[kind]
    pipeline = Flux2Pipeline(**parts) if kind == "dev" else Flux2KleinPipeline(**parts, is_distilled=False)

    def opened(name):
        image = Image.open(folder / name)
        width, height = (side // 16 * 16 for side in image.size)
        return Flux2ImageProcessor().preprocess(image, height=height, width=width, resize_mode="crop")

    def encoded(name):
        return pipeline._encode_vae_image(opened(name), generator=None)

    embeddings, _ = pipeline.encode_prompt(
        row["text"], max_sequence_length=text.length, text_encoder_out_layers=text.layers
    )
    return encoded(row["file_name"]), [encoded(name) for name in row["references"]], embeddings


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize(("kind", "guidance"), [("dev", 1.0), ("klein", None)])
@torch.no_grad()
def test_the_first_loss_on_a_folder_of_edits_is_that_of_diffusers(
    train, edits, monkeypatch, kind, guidance, references
):
    """From files through cache and loader to the loss; the noise and the times are the run's own."""
    folder, rows = edits(references)
    seen = []

    def spy(batch, *arguments):
        seen.append((batch, add_noise(batch, *arguments)))
        return seen[-1][1]

    add_noise = objective.add_noise
    monkeypatch.setattr(objective, "add_noise", spy)
    with torch.enable_grad():
        run = train(
            "run",
            "steps=1",
            f"dataset.path={folder}",
            "dataset.reference_columns=[references]",
            "reference_resolution=64",
            kind=kind,
        )
    (batch, noised) = seen[0]
    assert sorted(batch.indices) == [0, 1]
    _, reference = helpers.transformers(kind)
    losses = []
    for row, index in enumerate(batch.indices):
        latents, others, embeddings = published_sample(kind, folder, rows[index])
        torch.testing.assert_close(batch.latents[row : row + 1], latents, rtol=0, atol=1e-4)
        assert [tuple(other.shape[2:]) for other in others] == [(4, 2), (3, 4), (2, 3)][:references]
        for ours, wanted in zip(batch.references, others, strict=True):
            torch.testing.assert_close(ours[row : row + 1], wanted, rtol=0, atol=1e-4)
        noise = from_tokens(noised.target[row : row + 1], 2, 4) + batch.latents[row : row + 1]
        time = noised.times[row : row + 1]
        losses.append(helpers.published_step(reference, latents, others, embeddings, time, noise, guidance)[2])
    assert values(run) == [pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)]


def test_training_klein_kv_has_the_loss_of_diffusers_kv_forward_and_resumes_exactly(train, edits, at_step, monkeypatch):
    """The references see themselves alone, at time 0: on a small random model in the place of klein_9b_kv."""
    variant = VARIANTS["small_klein"]
    isolated = replace(variant.transformer, isolated_references=True)
    monkeypatch.setitem(VARIANTS, "small_klein", replace(variant, transformer=isolated))
    folder = edits(2)[0]
    seen = []

    def spy(batch, *arguments):
        seen.append((batch, add_noise(batch, *arguments)))
        return seen[-1][1]

    add_noise = objective.add_noise
    monkeypatch.setattr(objective, "add_noise", spy)
    references = [f"dataset.path={folder}", "dataset.reference_columns=[references]", "reference_resolution=64"]
    whole = train("run", *references, kind="klein")
    batch, noised = seen[0]
    parts = helpers.reference_parts("klein")
    made = Flux2KleinKVPipeline(**parts | {"transformer": deepcopy(parts["transformer"])})
    count = noised.tokens.shape[1] - noised.target.shape[1]
    both = noised.tokens, noised.positions
    turned = [torch.cat([one[..., -count:, :], one[..., :-count, :]], dim=-2) for one in both]  # references first
    with torch.no_grad():
        prediction = made.transformer(
            hidden_states=turned[0],
            encoder_hidden_states=batch.embeddings.float(),
            timestep=noised.times,
            img_ids=turned[1],
            txt_ids=noised.text_at,
            kv_cache_mode="extract",
            num_ref_tokens=count,
            return_dict=False,
        )[0]
    wanted = (prediction - noised.target).square().mean().item()
    assert values(whole)[0] == pytest.approx(wanted, rel=1e-5)
    at_step(2, ask_to_stop())
    with pytest.raises(Interrupted):
        train("cut", *references, kind="klein")
    assert lines(train("cut", *references, "resume=auto", kind="klein")) == lines(whole)
    monkeypatch.setitem(VARIANTS, "small_klein", variant)
    assert values(train("ordinary", *references, "steps=1", kind="klein"))[0] != pytest.approx(wanted, rel=1e-4)


# ------------------------------------------------------------------ the relighting experiment


def write_varied_pairs(folder):
    """Four edits of one size with references of three sizes."""
    for name in ("target", "source"):
        (folder / name).mkdir(parents=True)
    for i, size in enumerate([(32, 64), (64, 48), (48, 48), (48, 48)]):
        draw_picture(i, (48, 48)).save(folder / "target" / f"{i}.png")
        draw_picture(i + 9, size).save(folder / "source" / f"{i}.png")
        (folder / "target" / f"{i}.txt").write_text(f"make it {i}")
    return folder


def test_a_step_trains_edits_of_several_shapes_as_their_mean(train, tmp_path, capsys, captured):
    """Each step has all four edits, however it is split."""
    folder = write_varied_pairs(tmp_path / "edits")
    settings = ["dataset=pairs", f"dataset.path={folder}", "model.resolution=48", "steps=2"]
    together = values(train("together", *settings, "batch_size=4"))
    assert "48 x 48 (2)" in capsys.readouterr().out  # the table of buckets
    apart = values(train("apart", *settings, "batch_size=1", "gradient_accumulation=4"))
    assert together == pytest.approx(apart, rel=1e-4)
    for trainer in captured:
        assert [sorted(trainer.loader.sampler.batch(step)) for step in range(2)] == [[0, 1, 2, 3]] * 2
    train("more", *settings, "batch_size=6")
    assert "48 x 48: 4" in capsys.readouterr().out  # two of six are repeats, and that is said


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_processes_train_edits_of_several_shapes_like_one(tmp_path, shard):
    """A process whose samples have fewer shapes calls the model as often: with a sharded base, all would wait."""
    edits = write_varied_pairs(tmp_path / "edits")
    settings = ["model=tiny", "dataset=pairs", f"dataset.path={edits}", f"cache_dir={tmp_path / 'cache'}", "steps=4"]
    settings += [f"{key}=0" for key in ("sample_every", "validate_every", "checkpoint_every")] + ["log_every=1"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    done = execute(launch("train/run.py", *settings, "batch_size=4", f"output_dir={alone}"))
    assert done.returncode == 0, done.stderr
    words = [*settings, "batch_size=2", f"shard={shard}", f"output_dir={together}"]
    done = execute(launch("train/run.py", *words, processes=2), timeout=300, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert values(together) == pytest.approx(values(alone), rel=1e-5)


def pairs_as_parquet(folder):
    """A table with the columns of the published data set."""
    rows = [
        {
            "file_name": draw_picture(i, (64, 48)),
            "output": draw_picture(10 + i, (64, 48)),
            "instruction": "make it dark",
        }
        for i in range(2)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "pairs.parquet"))
    return [f"dataset.path={folder / 'pairs.parquet'}"]


def pairs_as_folder(folder):
    """With the settings that the experiment's head gives for it."""
    rows = []
    for i in range(2):
        draw_picture(i, (64, 48)).save(folder / f"before{i}.png")
        draw_picture(10 + i, (64, 48)).save(folder / f"after{i}.png")
        rows.append({"file_name": f"after{i}.png", "references": [f"before{i}.png"], "text": "make it dark"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["image_column=file_name", "caption_column=text", "reference_columns=[references]"]
    return ["dataset=folder", *(f"dataset.{setting}" for setting in [f"path={folder}", *columns])]


@pytest.mark.parametrize("pairs", [pairs_as_parquet, pairs_as_folder])
def test_the_relighting_experiment_trains_on_local_pairs(tmp_path, pairs):
    """Each target is learned with its own reference, whichever way the pairs are given."""
    draw_picture(20, (96, 48)).save(tmp_path / "room.png")
    settings = [
        *("+experiment=relighting", "model=tiny", "model.resolution=64", "steps=2", "log_every=1"),
        *("sample.prompts=[make it dark]", f"sample.references=[{tmp_path / 'room.png'}]", "sample.steps=1"),
        *("sample_every=2", f"output_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"),
    ]
    run = load_config(compose(*settings, *pairs(tmp_path)))
    for i, sample in enumerate(run.instantiate("dataset")):
        (reference,) = sample.references
        assert sample.target.load().tobytes() == draw_picture(10 + i, (64, 48)).tobytes()
        assert reference.load().tobytes() == draw_picture(i, (64, 48)).tobytes()
        assert sample.captions == ("make it dark",)
    folder = run_training(run).parent
    assert len(values(folder)) == 2
    assert values(folder, "lr") == pytest.approx([1e-4 / 201, 2e-4 / 201])
    assert any(tensor.abs().max() > 0 for name, tensor in adapter(folder).items() if "lora_B" in name)
    assert [path.name for path in sorted((folder / "samples").iterdir())] == ["step_000000.png", "step_000002.png"]
