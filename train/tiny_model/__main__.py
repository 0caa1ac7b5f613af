"""Draw the images and train the embedded model: `python -m train.tiny_model` (or `make tiny`).

The embedded model is a real FLUX.2 in every part (autoencoder, transformer with a guidance embedding, text encoder,
published folder layout), three thousand times smaller than dev, so that the framework runs on a laptop. Its world is
`data.synthetic.drawings`, drawn from a caption or by editing a reference. flux2/assets/tiny/README.md is its card.

Each stage is skipped when its result exists; an interrupted training resumes from its last checkpoint:

1. text: a tokenizer for the captions' words (it spells unknown words letter by letter) and a frozen, random Mistral.
   Random states are enough: the transformer learns what the words mean.
2. pictures: drawings for training, pairs for edits, and abstract scenes for the autoencoder alone, so that it can also
   encode images that are not drawings.
3. autoencoder: L1 + MSE + gradient loss, the colors of areas, and a small KL; half drawings, half scenes; crops first,
   whole images last.
4. latents: every image encoded, and the statistics that normalize the 128 channels.
5. transformer: flow matching in three lessons: in the first, one batch in four edits a reference; in the others, every
   second one, and these edits mostly change the size. One caption in ten is dropped. From `guide_from` on, half of each
   batch learns guided flows for guidance values in [1, 4], as in model-guidance (Tang et al. 2025, "Diffusion Models
   without Classifier-free Guidance"): the embedding then means what it means in dev, and guidance 1 stays the plain
   flow that LoRAs are trained with.
6. export: averaged weights in bfloat16 to flux2/assets/tiny.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flux2.weights.sources import TINY_FOLDER

STAGES = ("text", "pictures", "autoencoder", "latents", "transformer", "export")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures and train the embedded model.")
    parser.add_argument("--home", type=Path, default=Path("outputs/tiny"), help="folder of checkpoints and log")
    parser.add_argument("--folder", type=Path, default=TINY_FOLDER, help="folder of the finished model")
    parser.add_argument("--docs", type=Path, default=Path("docs/tiny.png"), help="file of the image grid")
    parser.add_argument("--until", choices=STAGES, default="export", help="the last stage to run")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all counts and steps, for a quick try")
    options = parser.parse_args()

    # these imports take seconds, and --help does without
    from train.tiny_model.autoencoder import encode_pictures, train_autoencoder
    from train.tiny_model.export import export, grid
    from train.tiny_model.training import Recipe
    from train.tiny_model.transformer import evaluate, train_transformer
    from train.tiny_model.world import catalog, draw_pictures, make_text_encoder

    home, folder, until = options.home, options.folder, STAGES.index(options.until)
    recipe = Recipe().scaled(options.scale)
    home.mkdir(parents=True, exist_ok=True)

    text = make_text_encoder(recipe.seed)
    world = catalog(recipe.seed, recipe.drawings, recipe.edits, recipe.scenes)
    if until < 1:
        return
    pictures = draw_pictures(world.jobs, home / "pictures.npy")
    if until < 2:
        return
    autoencoder = train_autoencoder(recipe, pictures, home)
    if until < 3:
        return
    latents = encode_pictures(autoencoder, pictures[: recipe.drawings + recipe.edits], home / "latents.safetensors")
    if until < 4:
        return
    model = train_transformer(recipe, world, latents, autoencoder, text, home)
    if until < 5:
        return
    export(model, autoencoder, recipe.seed, folder)
    scores = evaluate(model, autoencoder, text, None, recipe.judged)
    (home / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    grid(folder, options.docs)
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
