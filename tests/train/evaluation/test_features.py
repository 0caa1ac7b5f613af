"""train.evaluation.features: models of transformers, opened from folders, as vectors of images and prompts."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast

from flux2.models.pixels import to_pixels
from train.evaluate import EvaluationSettings, evaluate_runs
from train.evaluation.features import Clip, Vision
from train.reports import run_report

pytest_plugins = ("train_helpers",)

CPU = torch.device("cpu")


def not_needed():
    pytest.fail("not needed")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small random CLIP with a tokenizer of whole words, in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 16, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "<e>", "a", "red", "cup", "the", "blue", "fox"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return folder


def test_a_vision_model_compares_by_its_first_token(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    describe = Vision(str(tmp_path / "dino"), side=28).load(not_needed, CPU)
    red, blue = (describe(Image.new("RGB", (40, 30), color)) for color in ("red", "blue"))
    assert red.shape == (16,)
    assert float(red.norm()) == pytest.approx(1)
    assert float((red - blue).norm()) > 0.01
    with pytest.raises(ValueError, match=r"features\.path='?/nowhere"):
        Vision("/nowhere").load(not_needed, CPU)


def test_clip_gives_the_vectors_that_transformers_computes(clip):
    features = Clip(str(clip), side=32)
    image, model = Image.effect_noise((40, 40), 60).convert("RGB"), CLIPModel.from_pretrained(clip).eval()
    square = image.resize((32, 32), Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (features.mean, features.std))
    tokens = AutoTokenizer.from_pretrained(clip)(["a red cup"], padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=((to_pixels([square]) + 1) / 2 - mean) / std, **tokens)
    found, text = features.load(not_needed, CPU)(image), features.load_text(CPU)("a red cup")
    torch.testing.assert_close(found, F.normalize(output.image_embeds[0], dim=0))
    torch.testing.assert_close(text, F.normalize(output.text_embeds[0], dim=0))
    logits = output.logits_per_image / model.logit_scale.detach().exp()
    assert float(found @ text) == pytest.approx(float(logits), abs=1e-5)
    long = features.load_text(CPU)("a red cup the blue fox " * 20)  # cut, and no error
    assert float(long.norm()) == pytest.approx(1)


def test_an_evaluation_with_clip_says_how_well_images_fit_their_prompts(reference, clip, tmp_path):
    drawn = reference("sample.prompts=[a red cup,the blue fox]", "sample.steps=2", "sample_every=4")
    run = shutil.copytree(drawn, tmp_path / "run")
    settings = EvaluationSettings(str(run), seeds=[5], strengths=[0, 1.5], device="cpu")
    features = Clip(str(clip), side=32)
    (found,) = evaluate_runs(settings, features)
    image, text = features.load(not_needed, CPU), features.load_text(CPU)
    for row in (*found.rows, *found.strengths):
        cosines = [float(image(Image.open(file)) @ text(found.prompts[i])) for i, file in enumerate(row.files)]
        assert row.to_prompt == pytest.approx(sum(cosines) / 2)
    numbers = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert [row["to_prompt"] for row in numbers["rows"]] == [row.to_prompt for row in found.rows]
    page = run_report.write(run, [found])
    assert "fits the prompt" in page.read_text()
    assert f"{found.rows[-1].to_prompt:.3f}" in page.read_text()


def test_a_model_without_text_is_refused_with_its_path(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    Vision(str(tmp_path / "dino"), side=28).check()
    for call in (
        lambda: Vision(str(tmp_path / "nowhere")).check(),
        lambda: Clip(str(tmp_path / "dino"), side=28).check(),
        lambda: Clip(str(tmp_path / "dino"), side=28).load(not_needed, CPU)(Image.new("RGB", (28, 28))),
        lambda: Clip(str(tmp_path / "dino"), side=28).load_text(CPU)("a cup"),
    ):
        with pytest.raises(ValueError, match=r"features\.path=.*(dino.*get_text_features|nowhere.*cannot be loaded)"):
            call()
