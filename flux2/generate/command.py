"""Generate images: the command `python -m flux2.generate` (options in arguments.py)."""

import argparse
import dataclasses
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from flux2.adapters import find
from flux2.adapters.strengths import parse_ranges
from flux2.generate import metadata
from flux2.generate.arguments import option_parser
from flux2.generate.metadata import NamedFile, Record
from flux2.generate.progress import CLEAR, Screen
from flux2.generate.requests import Request, parse_request, read_lines, round_sizes
from flux2.models.inpainting import Inpainting
from flux2.models.variants import get_variant
from flux2.pipeline import Pipeline, load
from flux2.quantization.precision import caution, describe
from flux2.utils import checks
from flux2.utils.cli import format_error, is_out_of_memory, split_adapter
from flux2.utils.device import pick_device
from flux2.utils.files import atomic_write, check_new, user_path
from flux2.utils.images import check_target_file, check_writable, read_image
from flux2.utils.signals import exit_code, sigterm_as_interrupt
from flux2.utils.terminal import show
from flux2.weights.loading import text_encoder_fingerprint
from flux2.weights.sources import fingerprint

MAX_COUNT = 10_000
PLACES = ("path", "autoencoder", "text_encoder")
SAMPLING = ("seed", "width", "height", "steps", "guidance")
INPAINTING = ("mask", "strength", "mask_crop")
# options that flux2.pipeline.load takes under the same name
LOADED = (
    *PLACES[1:],
    "device",
    "precision",
    "offload_blocks",
    "cache",
    "tiled",
    "text_storage",
    "embeddings",
    "reference_cache",
)
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys([*PLACES, *SAMPLING, *INPAINTING, *LOADED, "prompt", "prompts", "from_image", "save_embeddings"]),
    **dict.fromkeys(["upsample", "merge", "verbose", "overwrite"], False),
    **{"model": "tiny", "out": Path("out.png"), "seed": 0, "count": 1, "offload_blocks": 0, "metadata": True},
    **{"image": [], "adapter": [], "asked": {}},  # asked: original prompts, by the prompts they were rewritten to
    "models": {},  # digests of those that the image of --from-image was made with
}
# recorded settings that are dropped if the given option replaces them
REPLACED = {
    "embeddings": ("embeddings", "text_encoder", "text_storage", "models"),
    "text_encoder": ("embeddings", "text_storage", "models"),
    **dict.fromkeys(["path", "autoencoder"], ("models",)),
    "text_storage": ("embeddings",),
    "upsample": ("embeddings",),
}


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(CLEAR, end="", file=sys.stderr)
    show(text, sys.stderr)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the given options, else those recorded in the image of --from-image, else DEFAULTS."""
    parser = option_parser()
    explicit = vars(parser.parse_args(argv))
    recorded = options_from_image(explicit["from_image"], explicit) if "from_image" in explicit else {}
    for key in [other for option in explicit for other in REPLACED.get(option, ())]:
        recorded.pop(key, None)
    options = argparse.Namespace(**DEFAULTS | recorded | explicit, given=frozenset(explicit))
    if options.prompt is None and options.prompts is None:
        parser.error("give --prompt, --prompts or --from-image")
    if "prompt" in explicit and "prompts" in explicit:
        parser.error("give --prompt or --prompts, not both")
    return options


def options_from_image(file: Path, explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings recorded in `file` as options. Raises ValueError if there are none, or files have changed."""
    what = f"--from-image {file}"
    record = metadata.read(file, what)
    replaced: dict[str, Any] = {f"{option}s": [] for option in ("image", "adapter") if option in explicit}
    if "mask" in explicit:
        replaced["mask"] = None
    if any("embeddings" in REPLACED.get(option, ()) for option in explicit):
        replaced["embeddings"] = None
    metadata.check_unchanged(dataclasses.replace(record, **replaced), what)
    recorded = {
        **{key: getattr(record, key) for key in ("model", "precision", *SAMPLING, "strength", "mask_crop")},
        "prompt": [record.prompt],
        "image": [Path(image.path) for image in record.images],
        "mask": None if record.mask is None else Path(record.mask.path),
        "adapter": [adapter.option() for adapter in record.adapters],
        "merge": record.merged,
        "asked": {} if record.asked is None else {record.prompt: record.asked},
    }
    if "model" not in explicit:  # these belong to the recorded model
        recorded |= {key: getattr(record, key) for key in (*PLACES, "text_storage")}
        if re.match(r"https?:", record.text_encoder or "") and not {"text_encoder", "embeddings"} & set(explicit):
            # the image may come from someone else
            raise ValueError(
                f"{what} names a text encoder at {record.text_encoder}, which would receive the prompt and the token. "
                "If it is yours, give it with --text-encoder"
            )
        recorded["embeddings"] = None if record.embeddings is None else Path(record.embeddings.path)
        recorded["models"] = record.models
    return recorded


def make_requests(options: argparse.Namespace) -> list[Request]:
    """Return the requested images. Raises ValueError for what is wrong independently of the model."""
    if not 1 <= options.count <= MAX_COUNT:
        raise ValueError(f"--count {options.count} must be an integer from 1 to {MAX_COUNT}")
    shared = {key: getattr(options, key) for key in (*SAMPLING, *INPAINTING, "out")} | {"images": options.image}
    if options.prompts is not None:
        if options.count > 1:
            raise ValueError(f"--count {options.count} has no effect with --prompts: write one line per image")
        return read_lines(options.prompts, shared, say)
    checks.strings("--prompt", options.prompt)
    lines = [{"prompt": prompt} for prompt in options.prompt for _ in range(options.count)]
    shared = round_sizes(shared, say)
    return [parse_request(line, i, len(lines), shared, say) for i, line in enumerate(lines)]


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options that have no effect together."""
    if options.save_embeddings is None:
        if options.merge and not options.adapter:
            raise ValueError("--merge has no effect without --adapter")
        return
    if options.embeddings is not None:
        raise ValueError("--save-embeddings and --embeddings exclude each other")
    if options.save_embeddings.suffix != ".safetensors":
        raise ValueError(f"--save-embeddings {options.save_embeddings} must end in .safetensors")
    unused = ("adapter", "merge", *INPAINTING)
    for name in unused if options.upsample else (*unused, "image"):  # which rewriting uses
        if name in options.given and getattr(options, name):
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect with --save-embeddings, which generates no images: remove it"
            )
    check_target_file(options.save_embeddings, f"--save-embeddings {options.save_embeddings}")
    check_new(options.save_embeddings, "--save-embeddings", overwrite=options.overwrite)


def run(options: argparse.Namespace) -> Iterator[Path]:
    """Generate and write images; yield each file when it is complete. Raises ValueError for invalid options."""
    check_options(options)
    requests = make_requests(options)
    pick_device(options.device)
    if options.save_embeddings is None:
        for request in requests:
            check_writable(request.out, f"--out {request.out}")
            check_new(request.out, "--out", overwrite=options.overwrite)
    pictures = read_images(requests)
    images = {path: NamedFile.from_path(path) for path in pictures if path is not None}
    # before the model is loaded, which takes minutes
    adapter_files = [NamedFile.from_adapter(*split_adapter(adapter)) for adapter in options.adapter]
    check_ranges(adapter_files, options)
    pipeline = load(options.model, options.path, **{key: getattr(options, key) for key in LOADED})
    if options.merge:
        pipeline.check_mergeable()
    requests = [request.complete(pipeline.variant) for request in requests]
    with closing(Screen(sum(request.computed_steps for request in requests))) as screen:
        if options.upsample:
            screen.status("rewriting prompts")
            requests, originals = upsample_prompts(pipeline, requests, pictures)
            options.asked = options.asked | originals
        screen.status("encoding prompts")
        if options.save_embeddings is not None:
            pipeline.save_embeddings(options.save_embeddings, [request.prompt for request in requests])
            yield options.save_embeddings
            return
        # before the transformer, for which the text encoder is freed; with the empty prompt if any image needs it
        guidance = next((request.guidance for request in requests if request.guidance != 1), 1.0)
        pipeline.embeddings([request.prompt for request in requests], guidance)
        screen.status("loading the transformer")
        load_adapters(pipeline, adapter_files, options)
        screen.begin()
        recorded = {key: getattr(options, key) for key in ("model", *PLACES, "text_storage")}
        recorded |= {"precision": pipeline.precision.name, "adapters": adapter_files, "merged": options.merge}
        recorded["embeddings"] = None if options.embeddings is None else NamedFile.from_path(options.embeddings)
        recorded["models"] = digests_of_models(pipeline, options)
        for request in requests:
            image, settings = draw(pipeline, request, pictures, screen)
            settings |= {
                "images": [images[path] for path in request.images],
                "mask": images[request.mask] if request.mask else None,
            }
            record = Record(**settings, **recorded, asked=options.asked.get(request.prompt))
            file = write(image, request.out, record if options.metadata else None, overwrite=options.overwrite)
            with screen.image_done(f"{file}: {request.computed_steps} steps"):
                yield file


def read_images(requests: Sequence[Request]) -> dict[Path | None, Image.Image]:
    """Return the images that the requests read, by their files. Raises ValueError for what cannot be repainted."""
    pictures: dict[Path | None, Image.Image] = {}
    for request in requests:
        for path in request.inputs:
            if path not in pictures:
                kind, background = ("mask", "black") if path == request.mask else ("image", "white")
                pictures[path] = read_image(path, f"--{kind} {path}", background)
        inpainting_of(request, pictures)
    return pictures


def inpainting_of(request: Request, pictures: Mapping[Path | None, Image.Image]) -> Inpainting | None:
    references = [pictures[path] for path in request.images]
    sizes = request.width, request.height
    return Inpainting.from_arguments(
        references, pictures.get(request.mask), request.strength, request.mask_crop, *sizes
    )


def draw(
    pipeline: Pipeline, request: Request, pictures: Mapping[Path | None, Image.Image], screen: Screen
) -> tuple[Image.Image, dict[str, Any]]:
    """Return the image of a complete request, and the settings that give it again."""
    settings = {key: getattr(request, key) for key in ("prompt", *SAMPLING, "strength", "mask_crop")}
    if inpainting := inpainting_of(request, pictures):
        settings |= {"width": inpainting.size[0], "height": inpainting.size[1]}
    (image,) = pipeline.generate(
        **settings,
        references=[pictures[path] for path in request.images],
        mask=pictures.get(request.mask),
        progress=lambda _: screen.step(),
    )
    return image, settings if inpainting else settings | {"width": image.width, "height": image.height}


def digests_of_models(pipeline: Pipeline, options: argparse.Namespace) -> dict[str, str]:
    """Return a digest of each model that is loaded here; say which differ from those of --from-image."""
    digests = {"transformer": fingerprint(pipeline.source, "transformer")}
    digests["autoencoder"] = fingerprint(pipeline.source, "vae")
    if options.embeddings is None and not re.match(r"https?:", options.text_encoder or ""):
        digests["text encoder"] = text_encoder_fingerprint(pipeline.source)
    if changed := [what for what, digest in digests.items() if options.models.get(what, digest) != digest]:
        say(f"--from-image {options.from_image}: {' and '.join(changed)} changed since, so the image may be another")
    return digests


def check_ranges(adapters: Sequence[NamedFile], options: argparse.Namespace) -> None:
    """Raises ValueError for ranges of adapters that the model has not, or that merging cannot keep."""
    for adapter in adapters:
        ranges = parse_ranges(adapter.ranges, get_variant(options.model).transformer)
        if ranges.times and options.merge:
            raise ValueError(f"--adapter {adapter.option()}: a merged adapter has no times. Remove them, or --merge")


def load_adapters(pipeline: Pipeline, adapters: Sequence[NamedFile], options: argparse.Namespace) -> None:
    """Load the transformer and the adapters, and report both."""
    transformer = pipeline.transformer
    if pipeline.precision.storage is not None:
        say(describe(transformer, pipeline.precision, pipeline.device))
    if inexact := caution(transformer):
        say(f"warning: {inexact}. Images are more exact with --precision fp8 or bf16")
    for one in adapters:
        loaded = pipeline.load_adapter(one.path, one.scale, one.ranges)
        place, given = find(one.path), user_path(one.path)
        chosen = f" ({place.relative_to(given)})" if given in place.parents else ""  # of a run folder
        strength = ("" if one.scale == 1 else f" at scale {one.scale:g}") + (f", {one.ranges}" if one.ranges else "")
        say(f"adapter {one.path}{chosen}{strength}: {loaded}")
        if options.verbose:
            say(f"  layers: {loaded.listing()}")
    if options.merge:
        pipeline.merge_adapters()


def upsample_prompts(
    pipeline: Pipeline, requests: list[Request], pictures: Mapping[Path | None, Image.Image]
) -> tuple[list[Request], dict[str, str]]:
    """Return the requests with their prompts rewritten, and the original prompts by the new ones.

    A prompt is rewritten once per set of references, whatever the seeds of its images. The language model is loaded
    once for prompts without references, and once for those with references.
    """
    texts: dict[tuple[str, tuple[Path, ...]], str] = {}
    for images in dict.fromkeys(request.images for request in requests):
        prompts = [*dict.fromkeys(request.prompt for request in requests if request.images == images)]
        answers = pipeline.upsample(prompts, [pictures[path] for path in images])
        texts |= {(prompt, images): answer for prompt, answer in zip(prompts, answers, strict=True)}
    for (prompt, _), answer in texts.items():
        say(f"prompt {prompt!r} was rewritten to {answer!r}")
    rewritten = [dataclasses.replace(request, prompt=texts[request.prompt, request.images]) for request in requests]
    return rewritten, {answer: prompt for (prompt, _), answer in texts.items()}


def write(image: Image.Image, out: Path, record: Record | None, *, overwrite: bool) -> Path:
    """Save an image, with `record` in it if it is a PNG; the file is complete or absent.

    Return the file: `out`, or the next free name if another process has written `out` while the image was generated.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    ending = out.suffix.lower()
    text = {"pnginfo": record.chunk()} if record is not None and ending == ".png" else {}
    file, number = out, 0
    while True:
        try:
            with atomic_write(file, replace=overwrite) as unfinished:
                image.save(unfinished, Image.registered_extensions()[ending], **text)
        except FileExistsError:
            number += 1
            file = out.with_stem(f"{out.stem}_{number}")
        else:
            break
    if number:
        say(f"{out} was written by another process meanwhile: this image is {file}")
    return file


def main() -> int:
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the libraries are loaded
    try:
        with sigterm_as_interrupt():
            for file in run(arguments()):
                print(file, flush=True)
    except (ValueError, OSError) as error:
        say(f"error: {format_error(error)}")
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hints = "smaller --width/--height, fewer references, --tiled, --stream-blocks or another --precision"
        say(f"error: out of memory ({format_error(error) or type(error).__name__}). Try {hints}")
        return 2
    except KeyboardInterrupt as stop:
        say("interrupted")
        return exit_code(stop)
    return 0
