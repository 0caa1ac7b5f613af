"""The script that draws and trains the embedded model, at a thousandth of its size."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from train_helpers import execute

import flux2
from data.synthetic.captions import EDITS
from data.synthetic.drawings import held_out
from flux2.models.autoencoder import Autoencoder
from flux2.models.transformer import Transformer
from flux2.weights.safetensors_files import part_files
from flux2.weights.sources import TINY_FOLDER
from train.tiny_model.autoencoder import set_groups
from train.tiny_model.export import export
from train.tiny_model.training import Phase, Recipe, rate
from train.tiny_model.transformer import draw_batch, edit_shares
from train.tiny_model.world import TINY, Catalog, catalog, make_text_encoder, make_tokenizer, render


def test_unknown_words_are_spelt_and_so_told_apart() -> None:
    tokenizer = make_tokenizer()
    known = tokenizer("a red cup", add_special_tokens=False)["input_ids"]
    assert len(known) == 3
    one, other = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("trtcrd", "ohwx"))
    assert tokenizer.unk_token_id not in one + other
    assert one != other
    assert len(one) == 6


def test_the_tokenizer_is_that_of_the_embedded_model() -> None:
    committed = json.loads((TINY_FOLDER / "tokenizer" / "tokenizer.json").read_text())
    assert make_tokenizer().get_vocab() == committed["model"]["vocab"]


def test_embeddings_differ_between_prompts_and_repeat_for_one_seed() -> None:
    prompts = ["a red cup", "a red fish", ""]
    embeddings = make_text_encoder(0).encode(prompts)
    assert embeddings.shape == (3, 32, 192)
    assert (embeddings[0] - embeddings[1]).abs().max() > 0.1
    assert torch.equal(embeddings, make_text_encoder(0).encode(prompts))


def test_nothing_held_out_is_drawn_and_an_edit_keeps_the_jitter_of_its_source() -> None:
    world = catalog(seed=0, drawings=500, edits=200, scenes=3)
    assert len(world.jobs) == 703
    assert not any(held_out(job.drawing) for job in world.jobs if job.drawing is not None)
    for i, (source, instruction) in enumerate(world.edits):
        result = world.jobs[world.drawings + i]
        assert result.seed == world.jobs[source].seed
        assert result.drawing != world.jobs[source].drawing
        assert instruction
    assert all(job.drawing is None for job in world.jobs[-3:])


def kind(world: Catalog, target: int) -> str:
    source, result = (asdict(world.jobs[i].drawing) for i in (world.edits[target - world.drawings][0], target))
    (changed,) = (key for key in EDITS if source[key] != result[key])
    return changed


def test_a_lesson_sees_its_share_of_edits_and_of_each_kind() -> None:
    recipe = Recipe()
    world = catalog(seed=0, drawings=300, edits=300, scenes=0)
    latents = torch.arange(600.0)[:, None, None, None].expand(-1, 128, 8, 8)  # each picture's number
    for lesson in recipe.transformer:
        shares = edit_shares(world, lesson.kinds) if lesson.kinds else None
        seen: list[str] = []
        for step in range(lesson.edits_every * 40):
            batch = draw_batch(recipe, lesson, world, shares, latents, step, np.random.default_rng(step))
            edits = step % lesson.edits_every == lesson.edits_every - 1
            assert len(batch.references) == edits
            if edits:
                targets = [int(latent[0, 0, 0]) for latent in batch.latents]
                sources = [int(latent[0, 0, 0]) for latent in batch.references[0]]
                assert sources == [world.edits[target - world.drawings][0] for target in targets]
                seen += [kind(world, target) for target in targets]
        assert len(seen) == 40 * 24
        for name, share in (lesson.kinds or {}).items():
            assert abs(seen.count(name) / len(seen) - share) < 0.06


def test_a_job_renders_the_same_picture_every_time() -> None:
    world = catalog(seed=3, drawings=2, edits=1, scenes=1)
    for job in world.jobs:
        assert (render(job) == render(job)).all()
        assert render(job).shape == (128, 128, 3)


def test_rate_warms_up_stays_flat_and_falls_to_zero() -> None:
    assert rate(0, 1000, 0.6) == pytest.approx(0.01)
    assert rate(300, 1000, 0.6) == 1.0
    assert rate(800, 1000, 0.6) == pytest.approx(0.5)
    assert rate(1000, 1000, 0.6) == pytest.approx(0.0)


def test_a_scaled_recipe_keeps_everything_but_counts_and_steps() -> None:
    recipe = Recipe().scaled(0.001)
    assert recipe.drawings == 24
    assert [lesson.steps for lesson in recipe.transformer] == [11, 8, 8]
    assert recipe.transformer[0].lr == Recipe().transformer[0].lr
    assert recipe.judged == 8
    assert [phase.steps for phase in recipe.autoencoder] == [8, 8]
    assert isinstance(recipe.autoencoder[0], Phase)


def test_norm_groups_change_and_weights_stay() -> None:
    layer = torch.nn.Sequential(torch.nn.GroupNorm(8, 16))
    set_groups(layer, 1)
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), torch.nn.functional.group_norm(x, 1, eps=layer[0].eps))


def test_a_written_folder_has_the_tensors_of_the_embedded_one(tmp_path: Path) -> None:
    export(Transformer(TINY.transformer), Autoencoder(TINY.autoencoder), 0, tmp_path)
    for part in ("transformer", "vae", "text_encoder"):
        written, embedded = part_files(tmp_path / part), part_files(TINY_FOLDER / part)
        assert written.plan == embedded.plan, part


@pytest.mark.slow
def test_the_whole_script_runs_and_its_folder_opens(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.tiny_model", "--home", str(tmp_path / "home"), "--scale", "0.001"]
    options = ["--folder", str(tmp_path / "model"), "--docs", str(tmp_path / "grid.png")]
    done = execute(command + options, timeout=1800, TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    picture = flux2.load("tiny", str(tmp_path / "model"), device="cpu").generate("a red cup", steps=2)[0]
    assert picture.size == (128, 128)
    assert (tmp_path / "home" / "log.jsonl").exists()
    assert (tmp_path / "grid.png").exists()
