"""Runs in an environment of its own: LitServe with its OpenAI interface, around a model that repeats what it is told.

PORT. The model is ours, three lines; the HTTP interface, its errors and its streams are LitServe's.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

import litserve


class Echo(litserve.LitAPI):
    def setup(self, device: str) -> None:
        """There is nothing to load."""

    def predict(self, request: Any) -> Iterator[str]:
        for word in str(request.messages[-1].content).split():
            time.sleep(0.01)
            yield word + " "


if __name__ == "__main__":
    served = litserve.LitServer(Echo(spec=litserve.OpenAISpec()), accelerator="cpu", workers_per_device=2)
    served.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, num_api_servers=1)
