"""Serve the studio, a page to work in: `python train/studio.py [FOLDER ...]`, or `make studio`.

It reads and writes in the current folder and in each FOLDER, starts the commands that a shell starts, and shows each
of them. At 127.0.0.1 it needs no token. With --host, which other machines reach, a browser needs the token that is
in the file that is named at the start, and keeps it in a cookie (docs/studio.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first in sys.path, and ours would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import platform
import re
from collections.abc import Sequence

from data.files import user_path
from flux2.utils.terminal import show

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C. Raises ValueError for bad options."""
    try:
        import uvicorn

        from flux2.serve.command import bind_socket
        from flux2.serve.connections import server_config
        from train.pages.app import application
        from train.pages.base import Studio
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install -e '.[studio]'") from error
    from train.pages.queue import Queue, own_secret, secret_of
    from train.pages.workspace import Workspace

    folders = [Path.cwd(), *options.folders]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ValueError(f"{missing[0]} is not a folder. Give folders of pictures, data sets or runs")
    workspace = Workspace([folder.resolve() for folder in folders])
    is_local = options.host in LOCAL
    place = workspace.outputs / "studio"
    file = own_secret("studio-token")
    token = None if is_local else secret_of(file)
    with bind_socket("127.0.0.1" if options.host == "localhost" else options.host, options.port) as listening:
        port = listening.getsockname()[1]
        hosts = frozenset(f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")) if is_local else None
        queue = Queue(place / "queue" / re.sub(r"[^\w.-]", "_", platform.node() or "machine"))
        app = application(Studio(workspace, queue, hosts, token))
        name = f"[{options.host}]" if ":" in options.host else options.host
        print(f"studio at http://{name}:{port}" + (f", with the token in {file}" if token else ""), flush=True)
        queue.run()
        try:
            uvicorn.Server(server_config(app)).run(sockets=[listening])
        finally:
            queue.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and serve."""
    parser = argparse.ArgumentParser(
        description="Serve a page for pictures, training, runs and adapters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", type=user_path, metavar="FOLDER", help="further folders to open")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; any but this machine's needs a token"
    )
    parser.add_argument("--port", type=int, default=8760, help="port; 0 chooses a free one")
    try:
        serve(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        used = "; a studio may be there already: end it with Ctrl-C, or give another --port" * ("in use" in str(error))
        show(f"error: {error}{used}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
