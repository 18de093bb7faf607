"""Run the workspace, or train its model.

``python -m ngram_chat serve --port 8000`` and ``python -m ngram_chat train --to model.json TEXT…``.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
from pathlib import Path

from .app import ChatApp
from .http_server import Connection, OpenConnections
from .model import ModelFileError, NgramModel

DRAIN_S = 5.0  # how long answers under way may take after SIGTERM


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="ngram_chat", description="A small language model as an NGPU workspace.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="learn from text files and write a model file")
    train.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="files or folders (*.md, *.txt)")
    train.add_argument("--to", type=Path, required=True, help="the model file to write")
    serve = commands.add_parser("serve", help="answer HTTP")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one; the port is printed")
    serve.add_argument("--model", type=Path, help="a model file made by train")
    serve.add_argument("--texts", nargs="+", type=Path, metavar="TEXT", help="learn from these at start instead")
    serve.add_argument("--token-delay-ms", type=float, default=40.0, help="how long one token takes (default 40)")
    arguments = parser.parse_args()
    try:
        if arguments.command == "train":
            model = NgramModel.train(_read(arguments.texts))
            model.save(arguments.to)
            print(f"learned {model.vocabulary_size} words, wrote {arguments.to}")
            return 0
        if arguments.model is not None:
            model = NgramModel.load(arguments.model)
        else:
            model = NgramModel.train(_read(arguments.texts or [Path(__file__).parent]))
        asyncio.run(_serve(arguments, model))
    except (OSError, ValueError, ModelFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _read(paths: list[Path]) -> list[str]:
    """Return the texts of *paths*; a folder stands for the Markdown and text files in it.

    Without any, the package's own sources are read: enough English in comments to say something.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("**/*")) if path.is_dir() else [path]
        files += [file for file in inside if file == path or file.suffix in (".md", ".txt", ".py")]
    return [file.read_text(encoding="utf-8") for file in files]


async def _serve(arguments: argparse.Namespace, model: NgramModel) -> None:
    app = ChatApp(model, token_delay_s=arguments.token_delay_ms / 1000)
    connections = OpenConnections()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = await loop.create_server(
        lambda: Connection(app.open_sink, connections), arguments.host, arguments.port, backlog=512
    )
    port = server.sockets[0].getsockname()[1]
    print(f"ngram_chat: {model.vocabulary_size} words, http://{arguments.host}:{port}", flush=True)
    await stop.wait()
    server.close()
    for connection in list(connections):
        connection.stop_accepting()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            await connections.emptied()
    for connection in list(connections):
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
