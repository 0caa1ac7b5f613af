"""Serve a text encoder to machines that have no room for it: `python -m flux2.serve --model dev --port 8700`.

Train with `text_encoder=remote text_encoder.url=http://127.0.0.1:8700` (docs/text-encoders.md). Other machines need a
bearer token, which both sides read from the environment variable FLUX2_TEXT_ENCODER_TOKEN, or, with the default
address, a tunnel: `ssh -L 8700:localhost:8700 machine`. SIGTERM and Ctrl-C end the server after the current requests
are answered.
"""

import argparse

from flux2.models.variants import VARIANTS
from flux2.utils.choices import TEXT_STORAGES


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flux2.serve",
        description=(__doc__ or "").partition(":")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="tiny", choices=list(VARIANTS), help="the model whose text encoder is served")
    add("--path", help="repository id or folder with text_encoder/ and tokenizer/; default: published")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 means all, and needs a token")
    add("--port", type=int, default=8700, help="port; 0 chooses a free one")
    add("--device", help="cuda or cpu; default: the GPU if there is one")
    add("--precision", choices=["bf16", "fp32"], help="default: bf16 on a GPU, else fp32")
    add("--storage", choices=list(TEXT_STORAGES), help="store the layers' weights in 4 or 8 bits")
    add("--captions", action="store_true", help="serve captions too: loads dev's whole language model in addition")
    add("--batch", type=int, default=1, help="prompts per batch; above 1, rounding depends on the batch")
    add("--max-prompts", type=int, default=32, help="prompts per request")
    add("--max-characters", type=int, default=20_000, help="characters per prompt")
    add("--max-length", type=int, default=512, help="tokens that prompts may be padded to")
    add("--max-body", type=int, default=1 << 20, metavar="BYTES", help="bytes per request")
    add("--max-image", type=int, default=4 << 20, metavar="BYTES", help="bytes per request with an image")
    add("--max-waiting", type=int, default=256, help="waiting prompts and images; further ones are answered with 503")
    return parser.parse_args(argv)
