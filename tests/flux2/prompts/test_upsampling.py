"""flux2.prompts.upsampling: the answers are transformers' own, references are seen, and what cannot be done is
refused.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

import flux2
from flux2.generate import command as generate
from flux2.generate import metadata
from flux2.models.variants import VARIANTS
from flux2.pipeline import Pipeline
from flux2.prompts import embeddings as prompts
from flux2.prompts import saved as saved_prompts
from flux2.prompts import upsampling
from flux2.prompts.embeddings import TextSource
from flux2.prompts.upsampling import (
    EDIT,
    MOST_PIXELS,
    NEW_TOKENS,
    TEMPERATURE,
    TEXT_TO_IMAGE,
    load_upsampler,
    side_by_side,
)
from flux2.quantization.nf4 import Nf4Linear
from flux2.quantization.precision import Precision
from flux2.weights.sources import ModelSource, WeightsError

pytest_plugins = ("writer_helpers",)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP, as Pixtral's
FILE = "model.safetensors"
DEV = helpers.VARIANTS["dev"]


@pytest.fixture(scope="module")
def tokenizer(writer_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return writer_tokenizer


@pytest.fixture(scope="module")
def source(writer_source: ModelSource) -> ModelSource:
    return writer_source


def pipeline(source: ModelSource, text: TextSource | None = None) -> Pipeline:
    return Pipeline(source, torch.device("cpu"), Precision(), keep_text_encoder=False, text=text)


def squares(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def answer(
    writer: Mistral3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    seed: int,
    new_tokens: int = NEW_TOKENS,
    **seen: Any,
) -> str:
    """What transformers' own model writes behind `text`."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = writer.generate(**ids, **seen, max_new_tokens=new_tokens, do_sample=True, temperature=TEMPERATURE)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# ------------------------------------------------------------------ the answer


def test_the_numbers_are_the_reference_codes() -> None:
    assert (TEMPERATURE, NEW_TOKENS, MOST_PIXELS) == (0.15, 512, 768**2)


def test_a_prompt_becomes_what_the_whole_language_model_answers(source, writer, tokenizer) -> None:
    given = ["a small cup", "a fox"]
    found = pipeline(source).upsample(given, seed=5)
    for prompt, one in zip(given, found, strict=True):
        sent = f"<s>[SYSTEM_PROMPT]{TEXT_TO_IMAGE}[/SYSTEM_PROMPT][INST]{prompt}[/INST]"
        assert one == answer(writer, tokenizer, sent, 5)
    assert found[0] != found[1]


def test_references_are_shown_side_by_side_with_the_message_for_edits(source, writer, tokenizer) -> None:
    """Two pictures of 16 x 16 are one of 32 x 16 pixels: two rows of four tokens."""
    pictures = [squares(16, 16), squares(16, 16, 1)]
    whole = np.concatenate([np.asarray(picture) for picture in pictures], axis=1)
    pixels = (torch.from_numpy(whole).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    seen = {"pixel_values": pixels.permute(2, 0, 1)[None], "image_sizes": torch.tensor([[16, 32]])}
    row = "[IMG]" * 4
    sent = f"<s>[SYSTEM_PROMPT]{EDIT}[/SYSTEM_PROMPT][INST]{row}[IMG_BREAK]{row}[IMG_END]a red cup[/INST]"
    made = load_upsampler(source, torch.device("cpu"), torch.float32, TextSource(), pictures=True)
    found = made.inputs("a red cup", pictures)
    wanted_ids = tokenizer(sent, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert torch.equal(found["input_ids"], wanted_ids)
    assert torch.equal(found["image_sizes"], seen["image_sizes"])
    torch.testing.assert_close(found["pixel_values"], seen["pixel_values"])
    with torch.no_grad():
        logits = writer(input_ids=wanted_ids, **seen).logits
        blind = writer(input_ids=wanted_ids, **seen | {"pixel_values": -seen["pixel_values"]}).logits
        torch.testing.assert_close(made.model(**found).logits, logits)
    assert (logits - blind).abs().max() > 1e-2, "the model does not see the pictures"
    assert pipeline(source).upsample("a red cup", pictures) == [answer(writer, tokenizer, sent, 0, **seen)]


def test_what_is_sent_depends_on_what_the_references_show_and_on_their_order(source) -> None:
    made = load_upsampler(source, torch.device("cpu"), torch.float32, TextSource(), pictures=True)
    a, b = squares(32, 16), squares(16, 24, 1)
    found = [made.inputs("a cup", given)["pixel_values"] for given in ([a, b], [b, a])]
    assert found[0].shape == (1, 3, 24, 48)
    assert (found[0] - found[1]).abs().max() > 1


def test_references_are_white_around_and_at_most_768_pixels_square() -> None:
    whole = np.asarray(side_by_side([Image.new("RGB", (4, 8), "red"), Image.new("RGB", (4, 4), "blue")]))
    assert whole.shape == (8, 8, 3)
    assert (whole[:, :4] == (255, 0, 0)).all()
    assert (whole[2:6, 4:] == (0, 0, 255)).all()
    assert (whole[:2, 4:] == 255).all()
    assert (whole[6:, 4:] == 255).all()
    assert side_by_side([Image.new("RGB", (768, 768))]).size == (768, 768)
    assert side_by_side([Image.new("RGB", (2000, 1000))] * 2).size == (1536, 384)


def test_an_answer_depends_on_its_prompt_and_seed_alone(source) -> None:
    pipe = pipeline(source)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    alone = pipe.upsample("a fox", seed=2)
    assert torch.equal(torch.random.get_rng_state(), state), "what is drawn elsewhere has changed"
    torch.rand(3)
    assert pipe.upsample(["a cup", "a fox"], seed=2)[1:] == alone
    assert any(pipe.upsample("a fox", seed=seed) != alone for seed in range(3, 9))


def test_its_layers_are_quantized_as_the_encoders_are(source) -> None:
    made = load_upsampler(source, torch.device("cpu"), torch.float32, TextSource(storage="nf4"), pictures=False)
    linears = [m for m in made.model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 4 * 7
    assert all(isinstance(m, Nf4Linear) for m in linears)
    assert made.rewrite("a cup", new_tokens=4)


def test_files_of_other_versions_of_transformers_are_read(source, writer, tmp_path) -> None:
    """Newer ones write `language_model.` within `model.`, older ones without."""
    wanted = pipeline(source).upsample("a cup", [squares(16, 16)])
    shutil.copytree(source.path, tmp_path / "other", symlinks=True)
    file = tmp_path / "other" / "text_encoder" / FILE
    state = load_file(file)
    newer = "model.language_model.embed_tokens.weight" in state
    renamed = {}
    for name, tensor in state.items():
        if newer:
            name = name.replace("model.language_model.", "language_model.model.").replace(
                "lm_head", "language_model.lm_head"
            )
            renamed[name.replace("model.vision", "vision").replace("model.multi", "multi")] = tensor
        else:
            name = name.replace("language_model.lm_head", "lm_head").replace(
                "language_model.model.", "model.language_model."
            )
            renamed[f"model.{name}" if name.startswith(("vision", "multi")) else name] = tensor
    assert set(renamed) != set(state)
    save_file(renamed, file)
    assert pipeline(ModelSource(DEV, str(tmp_path / "other"))).upsample("a cup", [squares(16, 16)]) == wanted


def test_where_the_config_ties_them_the_embeddings_are_the_head(source, writer, tokenizer, tmp_path) -> None:
    shutil.copytree(source.path, tmp_path / "tied", symlinks=True)
    folder = tmp_path / "tied" / "text_encoder"
    save_file({k: v for k, v in load_file(folder / FILE).items() if "lm_head" not in k}, folder / FILE)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = Mistral3ForConditionalGeneration.from_pretrained(folder)
    sent = f"<s>[SYSTEM_PROMPT]{TEXT_TO_IMAGE}[/SYSTEM_PROMPT][INST]a cup[/INST]"
    tied = ModelSource(DEV, str(tmp_path / "tied"))
    made = load_upsampler(tied, torch.device("cpu"), torch.float32, TextSource(), pictures=False)
    found = made.rewrite("a cup", new_tokens=60)  # it would not end
    assert found == answer(theirs, tokenizer, sent, 0, new_tokens=60)
    assert found != answer(writer, tokenizer, sent, 0, new_tokens=60)


def test_an_answer_that_is_cut_is_told_and_an_empty_one_is_an_error(source, caplog, monkeypatch) -> None:
    made = load_upsampler(source, torch.device("cpu"), torch.float32, TextSource(), pictures=False)
    made.rewrite("a cup", new_tokens=1, seed=1)
    assert re.search(r"\b1 tokens?\b.*'a cup'", caplog.text)
    end = made.tokenizer.eos_token_id
    monkeypatch.setattr(made.model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[end]])], 1))
    with pytest.raises(ValueError, match="'a cup'"):
        made.rewrite("a cup")
    with pytest.raises(ValueError, match=r"\b2048\b.*'fox fox"):
        made.inputs("fox " * 3000)


# ------------------------------------------------------------------ what cannot be done


def test_models_and_sources_that_write_no_prompts_are_refused(source, model_folders, tmp_path) -> None:
    file = tmp_path / "saved.safetensors"
    saved_prompts.write(file, DEV, {"a cup": torch.zeros(2, 48)}, 2)
    klein = ModelSource(helpers.VARIANTS["klein"], str(model_folders("klein")))
    server = TextSource(server="http://127.0.0.1:1")
    saved = TextSource(saved=saved_prompts.SavedPrompts(file, DEV))
    tiny = flux2.load("tiny", device="cpu")
    for pipe, said in (
        (pipeline(klein), "rewrit.*small_klein.*Qwen3"),
        (tiny, "rewrit.*embedded model.*text encoder"),
        (pipeline(source, server), r"rewrit.*http://127\.0\.0\.1:1\b.*embeddings"),
        (pipeline(source, saved), r"rewrit.*saved\.safetensors.*embeddings"),
    ):
        with pytest.raises(ValueError, match=said):
            pipe.upsample("a cup")


def test_an_encoder_that_is_cut_is_refused(source, tmp_path) -> None:
    for name, dropped, said in (
        ("headless", "lm_head", "head"),
        ("short", "layers.3", r"layers\.3"),
        ("blind", "vision_tower", "vision_tower"),
    ):
        shutil.copytree(source.path, tmp_path / name, symlinks=True)
        file = tmp_path / name / "text_encoder" / FILE
        save_file({key: value for key, value in load_file(file).items() if dropped not in key}, file)
        with pytest.raises(WeightsError, match=said):
            pipeline(ModelSource(DEV, str(tmp_path / name))).upsample("a cup", [squares(16, 16)])
    config = tmp_path / "blind" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())["text_config"]))
    with pytest.raises(WeightsError, match="vision tower"):
        pipeline(ModelSource(DEV, str(tmp_path / "blind"))).upsample("a cup", [squares(16, 16)])
    assert pipeline(ModelSource(DEV, str(tmp_path / "blind"))).upsample("a cup")


# ------------------------------------------------------------------ the command


def test_the_command_draws_the_new_prompt_and_keeps_both(source, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(VARIANTS, "tiny", replace(DEV, name="small_dev"))
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> int:
        sizes = ["--width", "32", "--height", "32", "--steps", "1", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["generate", "--path", source.path, *sizes, *words])
        return generate.main()

    assert command("--prompt", "a cup", "--count", "2", "--upsample") == 0
    err = capsys.readouterr().err
    (wanted,) = pipeline(source).upsample("a cup")
    assert len(re.findall(rf"'a cup'.*{re.escape(repr(wanted))}", err)) == 1, "once for both pictures"
    made = [metadata.read(tmp_path / f"out_00{i}.png", "x") for i in range(2)]
    assert [(one.prompt, one.asked, one.seed) for one in made] == [(wanted, "a cup", 0), (wanted, "a cup", 1)]
    assert command("--prompt", wanted, "--out", "same.png") == 0
    with Image.open(tmp_path / "same.png") as same, Image.open(tmp_path / "out_000.png") as first:
        assert same.tobytes() == first.tobytes()
    assert metadata.read(tmp_path / "same.png", "x").asked is None
    monkeypatch.setattr(upsampling, "load_upsampler", lambda *_: pytest.fail("the prompt is rewritten again"))
    monkeypatch.setattr(sys, "argv", ["generate", "--device", "cpu", "--from-image", "out_001.png", "--out", "two.png"])
    assert generate.main() == 0
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "out_001.png").read_bytes()


def test_the_command_says_what_writes_no_prompts(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate", "--prompt", "a cup", "--upsample", "--device", "cpu"])
    monkeypatch.setattr(prompts, "load_text_encoder", lambda *_: pytest.fail("a text encoder was loaded"))
    assert generate.main() == 2
    assert re.match("error: .*rewrit.*embedded model.*text encoder", capsys.readouterr().err)
