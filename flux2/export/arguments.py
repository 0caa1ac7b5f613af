"""Write adapters for other programs: `python -m flux2.export outputs/tarot/.../adapter --format comfyui --out
x.safetensors`.

ADAPTER is anything that `flux2.generate --adapter` accepts: a run, checkpoint or PEFT folder, or a file with keys of
diffusers, ComfyUI or kohya; several are added up. An adapter that is not a low-rank pair becomes the nearest one, and
the error is reported. With --format full-bfl or full-diffusers the adapters are merged into a complete transformer.
Each file is read back and compared before it gets its name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flux2.models.variants import VARIANTS

FULL = {"full-bfl": "bfl", "full-diffusers": "diffusers"}  # format of a complete transformer -> program of its keys
FORMATS = ("diffusers", "comfyui", "kohya", *FULL)
DTYPES = ("fp32", "bf16")
RANK = 64  # default rank of conversions


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flux2.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("adapter", nargs="+", metavar="ADAPTER[:SCALE]", help="folder or file")
    add("--format", required=True, choices=FORMATS, help="program whose keys are written, or a full checkpoint")
    add("--out", required=True, type=Path, help="a .safetensors file; a folder for full-diffusers")
    add("--model", choices=list(VARIANTS), help="the base, if the adapter does not record it")
    path = "repository id, folder or .safetensors file of the base, if weights are needed and not the published ones"
    add("--path", help=path)
    add("--rank", type=int, help=f"rank of the LoRA; {RANK} for conversions by default")
    error = "instead of a rank: the smallest rank of each layer with this error"
    add("--max-error", type=float, metavar="E", help=error)
    add("--dtype", choices=list(DTYPES), help="default: fp32 for a LoRA, the base's for a full checkpoint")
    add("--device", help="cuda or cpu; default: the GPU if there is one")
    add("--title", help="title in the file's metadata; default: the name of OUT")
    add("--trigger", default="", metavar="PHRASE", help="trigger word in the metadata")
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    options = parser.parse_args(argv)
    if options.rank is not None and options.max_error is not None:
        parser.error("give --rank or --max-error, not both")
    if options.format in FULL and (options.rank, options.max_error) != (None, None):
        parser.error(f"--format {options.format} keeps the complete change: remove --rank and --max-error")
    return options
