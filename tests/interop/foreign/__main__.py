"""``scripts/foreign-models``: model servers not written here, behind a real node, called by the openai client.

    llama.cpp   its HTTP server (package xllamacpp), chat on one copy and embeddings on another below a base of its own,
                each on a model with random weights that is made on the spot
    LitServe    its OpenAI interface around a model of three lines

Each is installed into an environment of its own, started, registered with a node by its loopback call, and called
through the bootstrap; what comes back is held against what the server says when it is asked directly. Downloads some
100 MB of packages once, so CI does not run it.

Exit code: 0 everything held, 1 something did not, 2 a server could not be installed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai

from examples.demo.network import CommandFailed, LocalNetwork, Workspace
from examples.demo.processes import Process, StartError
from tests.bench.systems import free_port

HERE = Path(__file__).parent
CACHE = Path(__file__).parents[3] / "build" / "foreign"
PACKAGES = {
    "llama.cpp": ("xllamacpp==2026.10.11549", "gguf==0.19.0", "numpy==2.4.6"),
    "LitServe": ("litserve==0.2.19",),
}
PROJECT, TINY, EMBEDDER, ECHO = "Foreign", "tiny-random", "tiny-embeddings", "lit-echo"
START_S, SOON_S = 60.0, 30.0
MANY = 250  # llama.cpp closes a kept connection after 100 requests
HELLO: list[Any] = [{"role": "user", "content": "hello there, how are you"}]


class Missing(Exception):
    """A server cannot be installed; the message says why."""


class Report:
    """The verdicts so far, printed as they come."""

    def __init__(self, *, quiet: bool) -> None:
        self.lines: list[dict[str, Any]] = []
        self._quiet = quiet

    def check(self, server: str, what: str, look: Callable[[], tuple[bool, str]]) -> None:
        """Add the verdict of *look*, which says whether it holds, and words; what it raises is a failure."""
        begun = time.monotonic()
        try:
            good, words = look()
        except (openai.OpenAIError, httpx.HTTPError, AssertionError, LookupError, TypeError, ValueError) as error:
            good, words = False, f"{type(error).__name__}: {error}"[:300]
        took_s = round(time.monotonic() - begun, 3)
        self.lines.append(
            {"verdict": "ok" if good else "FAILED", "server": server, "check": what, "text": words, "took_s": took_s}
        )
        if not self._quiet:
            print(f"{'ok' if good else 'FAILED':<7} {server:<10} {what:<22} {words}", flush=True)

    @property
    def failed(self) -> bool:
        """Whether any line failed."""
        return any(line["verdict"] == "FAILED" for line in self.lines)


def say(text: str) -> None:
    """Say what is under way."""
    print(f"        {text}", file=sys.stderr, flush=True)


def environment(name: str, cache: Path) -> Path:
    """Return the interpreter of an environment that has the packages of server *name*; made at the first time.

    Raises:
        Missing: they cannot be installed.
    """
    packages = PACKAGES[name]
    words = "-".join(package.replace("==", "-") for package in packages[:1])
    folder = cache / f"{words}-python{sys.version_info[0]}.{sys.version_info[1]}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    say(f"installing {', '.join(packages)} (once)")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True, timeout=120)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        subprocess.run([*install, *packages], check=True, capture_output=True, timeout=900)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or b""
        last = output.decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
        raise Missing(f"{name} cannot be installed: {last[0][:300]}") from error
    (folder / "complete").touch()
    return python


def eventually(holds: Callable[[], Any], within_s: float = SOON_S) -> tuple[Any, float]:
    """Return what *holds* returned once it was true, and after how long; the last it returned when it never was."""
    begun = time.monotonic()
    while True:
        found = holds()
        passed_s = time.monotonic() - begun
        if found or passed_s > within_s:
            return found, passed_s
        time.sleep(0.1)


class Trial:
    """One run: what it starts, it stops."""

    def __init__(self, report: Report, network: LocalNetwork, folder: Path, pythons: dict[str, Path]) -> None:
        self._report = report
        self._network = network
        self._folder = folder
        self._pythons = pythons
        self._servers: list[Process] = []
        self._workspace = Workspace("", "")
        self._tasks: list[str] = []
        self._http = httpx.Client(timeout=60, trust_env=False)

    # -- what it is made of

    def start_server(self, name: str, program: str, *arguments: str, port: int, health: str) -> Process:
        """Start one of the programs beside this module and return once it serves."""
        command = [str(self._pythons[name]), str(HERE / program), str(port), *arguments]
        server = Process(name, command, self._folder / f"{program}-{port}.log", cwd=self._folder)
        self._servers.append(server)
        url = f"http://127.0.0.1:{port}{health}"

        def serves() -> bool:
            try:
                return httpx.get(url, timeout=2, trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        server.wait_until(serves, START_S, f"did not answer {url}")
        return server

    def stop(self) -> None:
        """Stop the servers."""
        for server in self._servers:
            server.ask_to_stop()
        for server in self._servers:
            server.wait_stopped()

    def register(self, model: str, api: str) -> tuple[bool, str]:
        """Register with the node, as a model server does."""
        url = f"http://127.0.0.1:{self._network.nodes[0].model_port}/api/v0/ai/model/register"
        answer = httpx.post(url, json={"project": PROJECT, "model": model, "api": api, "cid": "0"}, trust_env=False)
        listed, after_s = eventually(lambda: model in self._listed())
        shown = next(one for one in self._models() if one["model"] == model)
        good = answer.json() == {"code": 0, "message": "ok"} and bool(listed) and shown["healthy"]
        return good, f"{api}; listed by the bootstrap after {after_s:.1f} s; {shown['detail'] or 'healthy'}"

    def _models(self) -> list[dict[str, Any]]:
        node = self._network.nodes[0]
        found: list[dict[str, Any]] = json.loads(self._network.command("ngpu-node", "models", "--json", peer=node))[
            "models"
        ]
        return found

    def _listed(self) -> list[str]:
        return [one.id for one in self._client().models.list().data]

    def _client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self._network.url}/v1", api_key=self._workspace.token, max_retries=0)

    def ask(self, path: str, document: Any, *, direct: str = "", method: str = "POST") -> httpx.Response:
        """Ask the bootstrap for *path*, or the server at the URL *direct*."""
        headers = {} if direct else self._workspace.headers
        body = json.dumps(document).encode() if method == "POST" else b""
        answer = self._http.request(
            method, (direct or self._network.url) + path, content=body,
            headers={**headers, "content-type": "application/json"},
        )  # fmt: skip
        if not direct and "ngpu-task-id" in answer.headers and answer.status_code == 200:
            self._tasks.append(answer.headers["ngpu-task-id"])
        return answer

    # -- what is looked at

    def run(self) -> None:
        """Go through all of it."""
        say("starting the servers")
        ports = {name: free_port() for name in (TINY, EMBEDDER, ECHO)}
        urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        model = str(self._folder / "tiny.gguf")
        chat = partial(self.start_server, "llama.cpp", "llama_cpp.py", model, port=ports[TINY], health="/health")
        first = chat()
        self.start_server(
            "llama.cpp", "llama_cpp.py", model, "--embeddings", "--prefix", "/llm", port=ports[EMBEDDER],
            health="/llm/health",
        )  # fmt: skip
        self.start_server("LitServe", "lit_serve.py", port=ports[ECHO], health="/health")
        self._workspace = self._network.add_workspace(
            f'name = "tiny"\nservice = "{PROJECT}/{TINY}"\nports = [8080]\nconcurrency = 8\n'
        )
        check = self._report.check
        check("llama.cpp", "register", lambda: self.register(TINY, urls[TINY] + "/v1/chat/completions"))
        check("llama.cpp", "register, below a base", lambda: self.register(EMBEDDER, urls[EMBEDDER] + "/llm/v1"))
        check("LitServe", "register", lambda: self.register(ECHO, urls[ECHO] + "/v1/chat/completions"))
        check("llama.cpp", "its own list", self._own_list)
        for server, name in (("llama.cpp", TINY), ("LitServe", ECHO)):
            check(server, "chat", partial(self._chat, name, urls[name]))
            check(server, "stream", partial(self._stream, name))
            check(server, "stream, its bytes", partial(self._stream_bytes, name, urls[name]))
            check(server, "its error", partial(self._error, name, urls[name]))
        check("llama.cpp", "completions", self._completions)
        check("llama.cpp", "embeddings", partial(self._embeddings, urls[EMBEDDER]))
        check("llama.cpp", "calls it has not", partial(self._unsupported, urls[EMBEDDER]))
        check("llama.cpp", "unknown model", self._unknown)
        check("llama.cpp", "nothing else of it", partial(self._nothing_else, urls[TINY]))
        check("llama.cpp", "a client that leaves", partial(self._leaves, urls[TINY]))
        check("llama.cpp", f"{MANY} calls, 8 at once", self._many)
        check("all", "receipts", self._receipts)
        check("llama.cpp", "killed, started again", partial(self._killed, first, chat))

    def _own_list(self) -> tuple[bool, str]:
        shown = {one["model"]: one for one in self._models()}
        return (
            shown[TINY]["lists"] == [TINY]
            and shown[EMBEDDER]["lists"] == [TINY]
            and TINY in shown[EMBEDDER]["detail"]
            and shown[ECHO]["lists"] is None,
            f"read at its root and below /llm; a remark where it has another name: {shown[EMBEDDER]['detail']!r}",
        )

    def _chat(self, model: str, url: str) -> tuple[bool, str]:
        asked = {"model": model, "messages": HELLO, "max_tokens": 16, "seed": 1, "temperature": 0}
        answer, direct = self.ask("/v1/chat/completions", asked), self.ask("/v1/chat/completions", asked, direct=url)
        parsed = self._client().chat.completions.create(**asked)  # type: ignore[call-overload]
        one, other = answer.json(), direct.json()
        alike = one["choices"] == other["choices"] and one.keys() == other.keys()
        good = answer.status_code == 200 and alike and parsed.choices[0].message.content is not None
        return good, f"as asked directly, with its own fields ({', '.join(sorted(one.keys())[:9])})"

    def _stream(self, model: str) -> tuple[bool, str]:
        asked: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 32, "stream": True}
        pieces = list(self._client().chat.completions.create(**asked))
        words = [piece.choices[0].delta.content for piece in pieces if piece.choices]
        ends = [piece.choices[0].finish_reason for piece in pieces if piece.choices]
        good = len([word for word in words if word]) > 3 and [end for end in ends if end] != []
        return good, f"{len(pieces)} events, ended by {[end for end in ends if end]}"

    def _stream_bytes(self, model: str, url: str) -> tuple[bool, str]:
        asked = {
            "model": model, "messages": HELLO, "max_tokens": 8, "seed": 1, "temperature": 0, "stream": True,
        }  # fmt: skip
        answer, direct = self.ask("/v1/chat/completions", asked), self.ask("/v1/chat/completions", asked, direct=url)
        good = answer.headers["content-type"] == direct.headers["content-type"]
        good = good and answer.content.endswith(b"data: [DONE]\n\n") and direct.content[-14:] == answer.content[-14:]
        good = good and answer.content.count(b"\n\n") == direct.content.count(b"\n\n")
        return good, f"{answer.headers['content-type']}, {answer.content.count(b'data: ')} events, [DONE]"

    def _error(self, model: str, url: str) -> tuple[bool, str]:
        asked = {"model": model, "messages": "not a list"}
        answer, direct = self.ask("/v1/chat/completions", asked), self.ask("/v1/chat/completions", asked, direct=url)
        good = (answer.status_code, answer.content) == (direct.status_code, direct.content)
        return good and answer.status_code >= 400, f"{answer.status_code}, its own words: {answer.text[:80]}"

    def _completions(self) -> tuple[bool, str]:
        done = self._client().completions.create(model=TINY, prompt="once", max_tokens=5)
        return (
            done.usage is not None and done.usage.completion_tokens == 5,
            f"{done.usage and done.usage.total_tokens} tokens",
        )

    def _embeddings(self, url: str) -> tuple[bool, str]:
        texts = ["hello", "a longer text than that"]
        made = self._client().embeddings.create(model=EMBEDDER, input=texts, encoding_format="float")
        direct = self.ask("/llm/v1/embeddings", {"model": EMBEDDER, "input": texts}, direct=url).json()
        ours, theirs = made.data[0].embedding, direct["data"][0]["embedding"]
        alike = all(abs(a - b) < 1e-5 for a, b in zip(ours, theirs, strict=True))
        return alike and len(made.data) == 2, f"{len(made.data)} vectors of {len(ours)}, as asked directly"

    def _unsupported(self, url: str) -> tuple[bool, str]:
        asked = {"model": EMBEDDER, "prompt": "a cat"}
        answer = self.ask("/v1/images/generations", asked)
        direct = self.ask("/llm/v1/images/generations", asked, direct=url)
        good = (answer.status_code, answer.content) == (direct.status_code, direct.content)
        return good and answer.status_code >= 400, f"{answer.status_code}, its own words: {answer.text[:80]}"

    def _unknown(self) -> tuple[bool, str]:
        try:
            self._client().chat.completions.create(model="no-such-model", messages=HELLO)
        except openai.NotFoundError as error:
            return error.code == "model_not_found", f"404 {error.message[:90]}"
        return False, "it was answered"

    def _nothing_else(self, url: str) -> tuple[bool, str]:
        there = self.ask("/slots", None, direct=url, method="GET").status_code
        answers = [
            self.ask(f"/proxy/8080{path}", {}, method=method)
            for method, path in (
                ("GET", "/slots"),
                ("GET", "/props"),
                ("POST", "/lora-adapters"),
                ("POST", "/completion"),
            )
        ]
        good = there == 200 and all(a.status_code == 404 and "path_not_served" in a.text for a in answers)
        served = self.ask("/proxy/8080/v1/models", None, method="GET").status_code
        return good and served == 200, "/slots, /props, /lora-adapters, /completion: 404; /v1/models: 200"

    def _leaves(self, url: str) -> tuple[bool, str]:
        asked: dict[str, Any] = {"model": TINY, "messages": HELLO, "max_tokens": 16_000, "stream": True}
        with self._client().chat.completions.with_streaming_response.create(**asked) as response:
            task_id = response.headers["ngpu-task-id"]
            next(iter(response.iter_lines()))

        def idle() -> bool:
            return not any(slot["is_processing"] for slot in self.ask("/slots", None, direct=url, method="GET").json())

        freed, after_s = eventually(idle)
        view, _ = eventually(lambda: self._task(task_id) if self._task(task_id).get("verdict") else None)
        outcome = (view or {}).get("attempts", [{}])[-1].get("outcome")
        words = f"its slot is free after {after_s:.2f} s; receipt {(view or {}).get('verdict')}, {outcome}"
        return bool(freed) and outcome == "client_gone", words

    def _task(self, task_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._http.get(
            f"{self._network.url}/api/v1/tasks/{task_id}", headers=self._workspace.headers
        ).json()
        return found

    def _many(self) -> tuple[bool, str]:
        asked = {"model": TINY, "messages": HELLO, "max_tokens": 2}

        def one(_: int) -> int:
            return self.ask("/v1/chat/completions", asked).status_code

        begun = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(one, range(MANY)))
        bad = [status for status in statuses if status != 200]
        return not bad, f"{MANY / (time.monotonic() - begun):.0f} a second, {len(bad)} failed {sorted(set(bad))}"

    def _receipts(self) -> tuple[bool, str]:
        verdicts = [
            eventually(lambda task_id=task_id: self._task(task_id).get("verdict"))[0] for task_id in self._tasks
        ]
        return bool(verdicts) and set(verdicts) == {
            "verified"
        }, f"{verdicts.count('verified')} of {len(verdicts)} verified"

    def _killed(self, server: Process, again: Callable[[], Process]) -> tuple[bool, str]:
        os.kill(server.pid, signal.SIGKILL)
        server.wait_stopped()
        gone, after_s = eventually(lambda: TINY not in self._listed())
        said = self.ask("/v1/chat/completions", {"model": TINY, "messages": HELLO})
        again()
        back, back_s = eventually(lambda: TINY in self._listed())
        served = self.ask("/v1/chat/completions", {"model": TINY, "messages": HELLO, "max_tokens": 2}).status_code
        words = f"withdrawn after {after_s:.1f} s, a call then: {said.status_code}; back {back_s:.1f} s after its start"
        return bool(gone) and said.status_code == 503 and bool(back) and served == 200, words


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and return the exit code."""
    parser = argparse.ArgumentParser(prog="foreign-models", description="Foreign model servers behind a real node.")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="where the servers are installed (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    report = Report(quiet=arguments.json)
    folder = Path(tempfile.mkdtemp(prefix="ngpu-foreign-"))
    problem = ""
    try:
        pythons = {name: environment(name, arguments.cache) for name in PACKAGES}
        with LocalNetwork(folder / "network", nodes=1, docker=False, say=say) as network:
            network.start()
            trial = Trial(report, network, folder, pythons)
            try:
                trial.run()
            finally:
                trial.stop()
    except Missing as error:
        print(f"foreign-models: {error}", file=sys.stderr)
        return 2
    except (StartError, CommandFailed) as error:
        problem = str(error)
        print(f"foreign-models: {problem}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    finally:
        if problem or report.failed:
            say(f"the logs stay in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    good = not problem and not report.failed
    if arguments.json:
        versions = [package for packages in PACKAGES.values() for package in packages[:1]]
        document = {"ok": good, "servers": versions, "client": f"openai {openai.__version__}", "checks": report.lines}
        print(json.dumps(document))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
