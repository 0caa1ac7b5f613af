"""Serve a text encoder: the command `python -m flux2.serve` (options in arguments.py)."""

import argparse
import os
import re
import signal
import socket
import sys

from flux2.prompts.captioning import DEV, load_caption_model
from flux2.prompts.remote_client import TOKEN, is_loopback
from flux2.quantization.precision import pick_dtype
from flux2.serve.arguments import arguments
from flux2.utils import checks
from flux2.utils.cli import format_error
from flux2.utils.device import pick_device
from flux2.utils.terminal import show
from flux2.weights.loading import embedding_identity, load_text_encoder, text_encoder_fingerprint
from flux2.weights.sources import model_source

SHORTEST_TOKEN = 16
LIMITED = ("prompts", "characters", "length", "body", "image", "waiting")  # --max-prompts etc.


def server_token(host: str) -> str | None:
    """Return the token that requests must carry. Raises ValueError if it is required and missing, or invalid."""
    token = os.environ.get(TOKEN, "").strip()
    if not token and not is_loopback(host):
        raise ValueError(
            f"--host {host} can be reached from other machines: set the environment variable {TOKEN} to a token that "
            'requests must carry (python -c "import secrets; print(secrets.token_urlsafe())"), or bind to 127.0.0.1'
        )
    if token and (len(token) < SHORTEST_TOKEN or not re.fullmatch(r"[!-~]+", token)):
        raise ValueError(f"the environment variable {TOKEN} must hold >= {SHORTEST_TOKEN} ASCII characters, no spaces")
    return token or None


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet. Raises ValueError if the address is in use or not local."""
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if os.name != "nt":  # Windows would let two processes have one port
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, checks.integer("--port", port, 0, 65535)))
    except OSError as error:
        opened.close()
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return opened


def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ValueError for invalid options."""
    try:
        import uvicorn

        from flux2.serve.app import Limits, ServedEncoder, application
        from flux2.serve.connections import server_config
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install -e '.[serve]'") from error

    limits = Limits(
        checks.integer("--batch", options.batch, 1),
        **{key: checks.integer(f"--max-{key}", getattr(options, f"max_{key}"), 1) for key in LIMITED},
    )
    token = server_token(options.host)
    device = pick_device(options.device)
    dtype = pick_dtype(options.precision, device)
    source = model_source(options.model, text_encoder=options.path)
    text = source.variant.text
    if options.captions and source.variant.name != DEV:
        raise ValueError(f"--captions needs a language model that sees, and {options.model} has none. Give --model dev")
    files = text_encoder_fingerprint(source)
    with bind_socket(options.host, options.port) as listening:
        served = ServedEncoder(
            encoder=load_text_encoder(source, device, dtype, options.storage),
            model=source.variant.name,
            kind=text.kind,
            layers=text.layers,
            width=source.variant.transformer.text_width,
            length=min(text.length, limits.length),
            identity=lambda length: embedding_identity(text, files, length, dtype, options.storage),
        )
        captioner = load_caption_model(source, device, dtype, options.storage) if options.captions else None
        config = server_config(application(served, limits, token, captioner))
        host, port = listening.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        access = "with" if token else "without"
        ready = f"{options.model}'s text encoder at http://{address}:{port}, {access} a token"

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    print(ready, flush=True)

        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has ended
            signal.signal(number, lambda *_: None)
        Server(config).run(sockets=[listening])


def main() -> int:
    options = arguments()
    try:
        run(options)
    except (ValueError, TypeError, OSError) as error:
        show(f"error: {format_error(error)}", sys.stderr)
        return 2
    except KeyboardInterrupt:  # while the model is loaded
        print("interrupted", file=sys.stderr)
        return 130
    return 0
