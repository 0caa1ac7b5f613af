"""Generate images: `python -m flux2.generate --model tiny --prompt "a small red cup on a blue background"`.

PNG files record how they were made, as text; `--from-image x.png` repeats an image, with the other options changed.
"""

import argparse
from pathlib import Path

from flux2.models.variants import VARIANTS
from flux2.utils.choices import PRECISIONS, TEXT_STORAGES
from flux2.utils.files import user_path


def option_parser() -> argparse.ArgumentParser:
    """Return a parser that gives only the options that are on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flux2.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add_model_options(parser)
    add("--prompt", action="append", help="prompt; repeat for more images")
    add("--upsample", action="store_true", help="let dev's text encoder rewrite the prompts in more detail")
    add(
        "--prompts",
        type=user_path,
        metavar="FILE",
        help='one JSON object per line: {"prompt": ...} and, if they differ, seed, width, height, steps, guidance, '
        "images, mask, strength, mask_crop, out",
    )
    add("--from-image", type=user_path, metavar="PNG", help="repeat this image; other options replace recorded ones")
    add("--image", action="append", type=user_path, help="reference image; repeatable, up to ten")
    add("--mask", type=user_path, metavar="FILE", help="repaint the first --image where this image is white")
    add("--strength", type=float, help="start from the first --image with this share of the steps; 0.8 with --mask")
    add("--mask-crop", type=int, metavar="PIXELS", help="compute only the mask's region and this margin around it")
    add(
        "--adapter",
        action="append",
        metavar="PATH[:SCALE[,RANGES]]",
        help="folder or file; repeatable. RANGES multiply SCALE in some blocks or at some times: "
        "double.0-3=0.5,single=0,time.0.5-1=0",
    )
    add("--out", type=user_path, help="output file; several are numbered (out.png)")
    add("--overwrite", action="store_true", help="replace output files that exist, which is an error otherwise")
    add("--seed", type=int, help="seed of the first image; the next ones count up (0)")
    add("--count", type=int, help="images per prompt (1)")
    add("--width", type=int, help="pixels, rounded to a multiple of 16")
    add("--height", type=int, help="pixels, rounded to a multiple of 16")
    add("--steps", type=int, help="sampling steps; default: the published number")
    add("--guidance", type=float, help="guidance scale; default: the published one")
    add("--device", help="cuda or cpu; default: the GPU if there is one")
    add("--precision", choices=PRECISIONS, help="default: bf16 on a GPU, else fp32")
    add(
        "--stream-blocks",
        dest="offload_blocks",
        type=number_or_share,
        metavar="N",
        help="blocks to offload to host memory: a number (8) or a share (0.5)",
    )
    add(
        "--tiled",
        action=argparse.BooleanOptionalAction,
        help="decode in stripes, which needs less memory; default: for images above a megapixel",
    )
    add(
        "--reference-cache",
        action=argparse.BooleanOptionalAction,
        help="compute references at the first step only, with more memory (klein_9b_kv); default: if the model can",
    )
    add(
        "--merge",
        action=argparse.BooleanOptionalAction,
        help="merge the adapters into the weights (fp32, bf16): faster, but rounded in bf16",
    )
    add("--verbose", action="store_true", help="list the layers of each adapter")
    add("--cache", type=folder_argument, help="folder of quantized copies; default: FLUX2_CACHE")
    add("--no-metadata", dest="metadata", action="store_false", help="do not record in the PNG how it was made")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model's files and the embeddings of prompts."""
    add = parser.add_argument
    add("--model", choices=list(VARIANTS), help="variant of FLUX.2 (tiny)")
    add("--path", help="repository id, folder or .safetensors file; default: the published one")
    add("--autoencoder", help="the same for the autoencoder, if it is not in PATH")
    add(
        "--text-encoder", help="the same for the text encoder and its tokenizer; or the address of a server, http://..."
    )
    add(
        "--text-storage",
        choices=TEXT_STORAGES,
        help="store the text encoder's layers in 4 or 8 bits; default: as the rest",
    )
    add(
        "--embeddings",
        type=user_path,
        metavar="FILE",
        help="file of --save-embeddings, whose prompts need no text encoder",
    )
    add(
        "--save-embeddings",
        type=user_path,
        metavar="FILE",
        help="write the prompts' embeddings and generate no images",
    )


def folder_argument(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty path is not a folder; remove the option to use none")
    return user_path(text)


def number_or_share(text: str) -> int | float:
    """Return `8` as a number of blocks, `0.5` and `1.0` as shares."""
    return int(text) if text.isdecimal() else float(text)
