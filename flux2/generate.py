"""Make pictures: `python -m flux2.generate --model tiny --prompt "a small red cup on a blue background"`."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path

from tqdm import tqdm

from flux2 import adapters, checks
from flux2.pictures import check_writable, read_picture
from flux2.pipeline import check_size, load, pick_device
from flux2.precision import NAMES, describe
from flux2.variants import VARIANTS

MAX_COUNT = 10_000


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flux2.generate", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="tiny", choices=list(VARIANTS), help="which FLUX.2")
    parser.add_argument("--path", help="repository id, folder or .safetensors file, if not the published place")
    parser.add_argument("--autoencoder", help="likewise for the autoencoder, if it is not at PATH")
    parser.add_argument(
        "--text-encoder", help="likewise for the text encoder and its tokenizer; or the address of a server, http://..."
    )
    parser.add_argument("--prompt", action="append", required=True, help="what to show; repeat for more pictures")
    parser.add_argument("--image", action="append", default=[], type=Path, help="a reference picture; repeatable")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="PATH[:SCALE]", help="folder or file; repeatable"
    )
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="several pictures are numbered")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16")
    parser.add_argument("--steps", type=int, help="by default what the model's authors use")
    parser.add_argument("--guidance", type=float, help="likewise")
    parser.add_argument("--device", help="cuda, cpu; the GPU if there is one")
    parser.add_argument("--precision", choices=list(NAMES), help="bf16 on a GPU, else fp32")
    parser.add_argument(
        "--stream-blocks",
        type=number_or_share,
        default=0,
        metavar="N",
        help="blocks that stay in host memory and stream to the device: a number (8) or a share (0.5)",
    )
    parser.add_argument("--cache", type=named_folder, help="folder of quantised copies; else what FLUX2_CACHE names")
    return parser.parse_args(argv)


def named_folder(given: str) -> Path:
    if not given:
        raise argparse.ArgumentTypeError("an empty path names no folder; leave it out for none")
    return Path(given)


def number_or_share(given: str) -> int | float:
    """`8` is a number of blocks, `0.5` and `1.0` are shares."""
    return int(given) if given.isdecimal() else float(given)


def split_adapter(given: str) -> tuple[str, float]:
    """`PATH[:SCALE]` -> path and scale. A colon that is part of the path stays there.

    Raises ValueError for a scale that is not finite.
    """
    path, colon, scale = given.rpartition(":")
    if not colon or Path(given).exists():
        return given, 1.0
    try:
        value = float(scale)
    except ValueError:
        return given, 1.0
    if not math.isfinite(value):
        raise ValueError(f"--adapter {given}: the scale {scale} must be a finite number")
    return path, value


def numbered(out: Path, index: int, count: int) -> Path:
    return out if count == 1 else out.with_name(f"{out.stem}_{index:03d}{out.suffix}")


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for what can be told before anything is loaded: numbers, and whether files can be written."""
    if not 1 <= options.count <= MAX_COUNT:
        raise ValueError(f"--count {options.count} must be at least 1 and at most {MAX_COUNT}")
    checks.texts("--prompt", options.prompt)
    pictures = len(options.prompt) * options.count
    checks.seeds(options.seed, pictures)
    width, height = (16 if side is None else side for side in (options.width, options.height))
    check_size(width, height)
    if options.steps is not None:
        checks.steps(options.steps)
    if options.guidance is not None:
        checks.guidance(options.guidance)
    pick_device(options.device)
    for i in range(pictures):
        check_writable(numbered(options.out, i, pictures), f"--out {options.out}")


def run(options: argparse.Namespace) -> list[Path]:
    """Generate and write; returns the files. Raises ValueError for anything wrong in `options`."""
    check(options)
    references = [read_picture(path, f"--image {path}") for path in options.image]
    given = [split_adapter(adapter) for adapter in options.adapter]
    for path, _ in given:
        adapters.find(path)  # before minutes are spent on loading the model
    pipeline = load(
        options.model,
        options.path,
        autoencoder=options.autoencoder,
        text_encoder=options.text_encoder,
        device=options.device,
        precision=options.precision,
        stream_blocks=options.stream_blocks,
        cache=options.cache,
    )
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    pipeline.embeddings(prompts, options.guidance)  # before the transformer is loaded for the adapters
    if pipeline.precision.storage is not None:
        print(describe(pipeline.transformer, pipeline.precision, pipeline.device), file=sys.stderr)
    for path, scale in given:
        found = pipeline.load_adapter(path, scale)
        print(f"adapter {path}{'' if scale == 1 else f' at scale {scale:g}'}: {found}", file=sys.stderr)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = []
    steps = pipeline.variant.steps if options.steps is None else options.steps
    with tqdm(total=len(prompts) * steps, unit="step", leave=False) as bar:
        for i, prompt in enumerate(prompts):
            (image,) = pipeline.generate(
                prompt,
                references=references,
                seed=options.seed + i,
                width=options.width,
                height=options.height,
                steps=options.steps,
                guidance=options.guidance,
                progress=lambda _: bar.update(),
            )
            written.append(numbered(options.out, i, len(prompts)))
            image.save(written[-1])
    return written


def message(error: Exception) -> str:
    """One line, whatever a library wrote, in which settings are called as this command calls them."""
    line = " ".join(str(error).split())
    line = re.sub(r"\bmodel\.(path|autoencoder|text_encoder)[=:] ?", lambda key: f"--{key[1].replace('_', '-')} ", line)
    return re.sub(r"\S{400,}", lambda name: f"{name[0][:120]}...{name[0][-40:]}", line)


def main() -> int:
    options = arguments()
    try:
        for file in run(options):
            print(file)
    except (ValueError, OSError) as error:
        print("error:", message(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
