"""Run the workspace: ``python -m gpu_challenge --port 8000``."""

import argparse
import contextlib
import sys

from .arrays import choose_all
from .http_server import Provers, serve


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_challenge", description="Answers GPU challenges.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; the port is printed")
    parser.add_argument("--arrays", default="auto", choices=["auto", "torch", "cupy", "numpy"])
    parser.add_argument("--node", default="", metavar="NODEADDR", help="answer for this node alone")
    arguments = parser.parse_args()
    try:
        arrays = choose_all(arguments.arrays)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    provers = Provers(arrays, arguments.node)
    server = serve(arguments.host, arguments.port, provers)
    print(f"{provers.arrays}, listening on http://{arguments.host}:{server.server_address[1]}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
