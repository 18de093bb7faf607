"""``scripts/gpu-trial``: a bootstrap and a node on this machine, and its own GPUs put through the whole path.

    gpus        what the node offers, as its bootstrap sees it
    challenge   the node shows its GPU to be what it claims, in a container (examples/challenge)
    container   a workspace that computes on the GPU comes up in a container
    metering    tasks whose true GPU time is known by CUDA events, against what their receipts say
    money       the node's own books and the bootstrap's statement come to the same; the statement is checked offline

`scripts/gpu-check` looks at the card and the driver; this looks at what the network makes of them. Wants an NVIDIA GPU,
a container engine that hands it out, and an image with PyTorch for the base (pulled, or named with ``--base``).

Exit code: 0 everything held, 1 something did not, 2 there is nothing to try it on, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import itertools
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from examples.demo.image import REPOSITORY_ROOT, BuiltImages, ImageError, build_example, engine_answers
from examples.demo.network import CommandFailed, LocalNetwork, NodePeer, Workspace
from examples.demo.processes import StartError
from ngpu_client import Client, NgpuError, Options

CHALLENGE, LOAD = "challenge", "gpu_trial"  # folders of examples/
DEFAULT_BASE = "pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime"
CHALLENGE_TIMEOUT_S = 1200.0
TASK_TIMEOUT_S = 120.0
RECEIPT_TIMEOUT_S = 20.0
TICK_S = 0.2  # what the driver's samples cannot tell apart; docs/gpu-check.md
PRICE = "0.25"

# name, the calls: when each begins (s after the first) and what it asks for
Step = tuple[str, float]
PATTERNS: list[tuple[str, list[tuple[float, list[Step]]]]] = [
    ("idle, 3 s", [(0.0, [("rest", 3.0)])]),
    ("steady, 6 s", [(0.0, [("busy", 6.0)])]),
    ("2 s idle, 3 s busy, 2 s idle", [(0.0, [("rest", 2.0), ("busy", 3.0), ("rest", 2.0)])]),
    ("200 ms on and off, 8 s", [(0.0, [("busy", 0.2), ("rest", 0.2)] * 20)]),
    ("two overlapping, busy 6 s", [(0.0, [("busy", 6.0)]), (2.0, [("busy", 2.0)])]),
    ("20 in a row of 300 ms, half busy", [(0.0, [("busy", 0.15), ("rest", 0.15)])] * 20),
]


class Nothing(Exception):
    """There is nothing to try it on; the message says what is missing."""


class Report:
    """The verdicts so far, printed as they come."""

    def __init__(self, *, quiet: bool) -> None:
        self.lines: list[dict[str, Any]] = []
        self._quiet = quiet

    def say(self, good: bool | None, check: str, text: str, **values: Any) -> None:
        """Add a line; *good* None is a remark."""
        verdict = {None: "note", True: "ok", False: "FAILED"}[good]
        self.lines.append({"verdict": verdict, "check": check, "text": text, **values})
        if not self._quiet:
            print(f"{verdict:<8} {check:<10} {text}", flush=True)

    def step(self, text: str) -> None:
        """Say what is under way."""
        print(f"         {text}", file=sys.stderr, flush=True)

    @property
    def failed(self) -> bool:
        """Whether any line failed."""
        return any(line["verdict"] == "FAILED" for line in self.lines)


class Trial:
    """One run: what it starts and makes, it stops and removes."""

    def __init__(self, report: Report, arguments: argparse.Namespace) -> None:
        self._report = report
        self._base: str = arguments.base
        self._rounds: int = arguments.rounds
        self._folder = Path(tempfile.mkdtemp(prefix="ngpu-trial-"))
        self._run_id = secrets.token_hex(4)
        self._images: list[BuiltImages] = []
        self._node_config = _read(arguments.node_config)
        self._bootstrap_config = _read(arguments.bootstrap_config)
        self._started: LocalNetwork | None = None

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._report.step("stopping")
        if self._started is not None:
            self._started.stop()
        for images in self._images:
            try:
                images.remove()
            except ImageError as problem:
                self._report.say(None, "clean-up", str(problem))
        if error is None or isinstance(error, (KeyboardInterrupt, Nothing)):
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            self._report.step(f"the logs stay in {self._folder}")

    def run(self) -> None:
        """Go through all of it.

        Raises:
            Nothing: no GPU, or no engine.
            StartError, CommandFailed, ImageError, NgpuError: with what was said last.
        """
        engine = engine_answers()
        if engine is None:
            raise Nothing("no container engine answers: start Docker, or set DOCKER_HOST")
        model = self._look_around(engine)
        prices = f'[prices]\ncurrency = "credits"\nper_second = {{ "{model}" = "{PRICE}" }}\n'
        network = self._started = LocalNetwork(
            self._folder / "network", nodes=1, docker=True, say=self._report.step,
            node_config=prices + self._node_config,
        )  # fmt: skip
        for example in (CHALLENGE, LOAD):
            self._build(example)
        network.start()
        self._show_offer()
        if self._rounds:
            self._challenge()
        self._tasks()
        self._money()

    # --- parts ----------------------------------------------------------------------------------------------------

    def _look_around(self, engine: str) -> str:
        """Say what GPUs there are, and return the first one's model."""
        from ngpu_node.gpus import inventory
        from ngpu_node.gpus.driver import DriverFault
        from ngpu_node.gpus.nvml import NvmlDriver

        driver = NvmlDriver()
        try:
            driver.open()
            found = inventory.of_survey(driver.survey())
        except DriverFault as fault:
            found = inventory.of_fault(fault)
        finally:
            driver.close()
        if not found.gpus:
            raise Nothing(f"no GPU: {found.reason}")
        names = ", ".join(gpu.reading.model for gpu in found.gpus)
        self._report.say(None, "machine", f"{names}; driver {found.driver_version}; engine {engine}")
        return found.gpus[0].reading.model

    def _reference(self, example: str) -> str:
        return f"ngpu-trial-{example.replace('_', '-')}:{self._run_id}"

    def _build(self, example: str) -> None:
        reference = self._reference(example)
        self._report.step(f"building {reference} on {self._base}")
        folder = REPOSITORY_ROOT / "examples" / example
        self._images.append(build_example(folder, reference, self._base, self._run_id))

    def _show_offer(self) -> None:
        shown = json.loads(self._command("ngpu-node", "gpus", "--json", peer=self._node))
        for gpu in shown["gpus"]:
            self._report.say(
                gpu["offered"], "gpus",
                f"{gpu['model']}, {gpu['offered_bytes'] / 2**30:.1f} GiB: "
                f"{'offered' if gpu['offered'] else gpu['against']}", uuid=gpu["uuid"],
            )  # fmt: skip

    def _challenge(self) -> None:
        workspace = self._add(CHALLENGE)
        self._network.restart_bootstrap(
            f'[challenges]\nworkspaces = ["{workspace.id}"]\nautomatic = false\n' + self._bootstrap_config
        )
        for number in range(self._rounds):
            began = time.monotonic()
            try:
                said = self._command(
                    "ngpu-bootstrap", "challenge", self._node.address, "--json", peer=self._bootstrap,
                    timeout_s=CHALLENGE_TIMEOUT_S,
                )  # fmt: skip
            except CommandFailed as problem:  # the findings are in what the bootstrap keeps, whatever they are
                self._report.say(False, "challenge", str(problem))
                return
            for run in json.loads(said)["runs"]:
                for one in run["challenges"]:
                    self._report.say(
                        one["finding"] == "good", "challenge",
                        f"{one['model']}, {one['memory_bytes'] / 2**30:.1f} GiB: {one['finding']} {one['detail']}; "
                        f"product {one['product_ms'] / 1000:.2f} of {one['product_limit_ms'] / 1000:.2f} s, chains "
                        f"{one['chains_ms'] / 1000:.2f} of {one['chains_limit_ms'] / 1000:.2f} s; "
                        f"{time.monotonic() - began:.1f} s in all", round=number,
                    )  # fmt: skip
        answer = httpx.get(f"{self._network.url}/api/v1/nodes/{self._node.address}", timeout=10)
        kept = answer.json().get("challenges", []) if answer.status_code == 200 else []
        self._report.say(bool(kept), "challenge", f"GET /api/v1/nodes/{self._node.address} shows {len(kept)} of them")
        self._command("ngpu-bootstrap", "workspace", "remove", workspace.id, peer=self._bootstrap)

    def _tasks(self) -> None:
        began = time.monotonic()
        workspace = self._add(LOAD)
        self._network.wait_deployed(workspace)
        self._report.say(True, "container", f"the load's container was ready after {time.monotonic() - began:.1f} s")
        with Client(self._network.url, workspace.token) as client:
            for name, calls in PATTERNS:
                time.sleep(1.5)  # what came before is settled
                self._pattern(client, name, calls)

    def _pattern(self, client: Client, name: str, calls: list[tuple[float, list[Step]]]) -> None:
        in_a_row = all(begin == 0.0 for begin, _ in calls)

        def call(begin_s: float, plan: list[Step]) -> tuple[list[list[float]], dict[str, Any], str]:
            time.sleep(max(0.0, started + begin_s - time.monotonic()))
            result = client.call("load", {"plan": plan}, options=Options(timeout_s=TASK_TIMEOUT_S))
            checked = client.check(result, within_s=RECEIPT_TIMEOUT_S)
            document = checked.file.to_document()
            verdict = str((document.get("acknowledgement") or {}).get("verdict"))
            return result.json()["busy"], document["receipt"], ", ".join(checked.broken) or verdict

        started = time.monotonic()
        with ThreadPoolExecutor(1 if in_a_row else len(calls)) as pool:
            done = [each.result() for each in [pool.submit(call, begin, plan) for begin, plan in calls]]
        true_s = _covered([(begin, end) for busy, _, _ in done for begin, end in busy])
        metered_s = sum(int(receipt["busyGpuMs"]) for _, receipt, _ in done) / 1000
        reserved_s = sum(int(receipt["reservedGpuMs"]) for _, receipt, _ in done) / 1000
        meters = "/".join(sorted({str(receipt["meter"]) for _, receipt, _ in done}))
        verdicts = sorted({verdict for _, _, verdict in done})
        allowed_s = max(0.05 * true_s, TICK_S)
        self._report.say(
            abs(metered_s - true_s) <= allowed_s and verdicts == ["verified"], "metering",
            f"{name}: true {true_s:.3f} s, metered {metered_s:.3f} s, error {metered_s - true_s:+.3f} s (allowed "
            f"{allowed_s:.3f}), reserved {reserved_s:.3f} s, {meters}; {len(done)} receipt(s) {'/'.join(verdicts)}",
            pattern=name, true_s=true_s, metered_s=metered_s, reserved_s=reserved_s, meter=meters,
        )  # fmt: skip

    def _money(self) -> None:
        file = self._folder / "statement.json"
        theirs = json.loads(
            self._command(
                "ngpu-bootstrap", "statement", self._node.address, "--file", str(file), "--json", peer=self._bootstrap
            )
        )
        (ours,) = json.loads(self._command("ngpu-node", "earnings", "--json", peer=self._node))["accounts"]
        compared = ("receipts", "paid_receipts", "reserved_gpu_ms", "busy_gpu_ms", "billed_gpu_ms", "root", "amounts")
        differing = [key for key in compared if key in theirs and theirs[key] != ours.get(key)]
        amounts = theirs.get("amounts") or theirs.get("totals") or {}
        self._report.say(
            not differing, "money",
            f"{theirs['receipts']} receipts, {theirs['busy_gpu_ms'] / 1000:.3f} s busy, "
            f"{theirs['billed_gpu_ms'] / 1000:.3f} s billed, {json.dumps(amounts)}; node and bootstrap "
            f"{'agree' if not differing else 'differ in ' + ', '.join(differing)}", statement=theirs, earnings=ours,
        )  # fmt: skip
        verifier = REPOSITORY_ROOT / "scripts" / "verify_statement.py"
        checked = subprocess.run(
            [sys.executable, str(verifier), str(file)], capture_output=True, text=True, timeout=60, check=False
        )
        text = (checked.stdout + checked.stderr).strip().splitlines()
        self._report.say(checked.returncode == 0, "money", f"scripts/verify-statement: {text[-1] if text else ''}")

    # --- what they share ------------------------------------------------------------------------------------------

    @property
    def _network(self) -> LocalNetwork:
        assert self._started is not None
        return self._started

    @property
    def _bootstrap(self) -> Any:
        return self._network.bootstrap

    @property
    def _node(self) -> NodePeer:
        return self._network.nodes[0]

    def _command(self, program: str, *arguments: str, peer: Any, timeout_s: float = 60.0) -> str:
        return self._network.command(program, *arguments, peer=peer, timeout_s=timeout_s)

    def _add(self, example: str) -> Workspace:
        lines = (REPOSITORY_ROOT / "examples" / example / "workspace.toml").read_text().splitlines()
        image = f'image = "{self._reference(example)}"'
        lines = [image if line.startswith("image = ") else line for line in lines]
        return self._network.add_workspace("\n".join(lines) + "\n")


def _covered(busy: Sequence[tuple[float, float]]) -> float:
    """Return for how long at least one of the spans held."""
    edges = sorted({edge for span in busy for edge in span})
    return sum(end - begin for begin, end in itertools.pairwise(edges) if any(b <= begin and end <= e for b, e in busy))


def _read(file: Path | None) -> str:
    return "" if file is None else file.read_text()


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-trial", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the verdicts there too; - for standard output, alone")
    parser.add_argument("--base", metavar="IMAGE", default=DEFAULT_BASE, help="image with python3 and PyTorch")
    parser.add_argument("--rounds", type=int, default=2, help="challenges (the first one warms up); 0 for none")
    parser.add_argument("--node-config", type=Path, metavar="FILE", help="TOML tables for the node's configuration")
    parser.add_argument("--bootstrap-config", type=Path, metavar="FILE", help="keys of the bootstrap's [challenges]")
    arguments = parser.parse_args()
    report = Report(quiet=arguments.json == "-")
    code = 1
    try:
        with Trial(report, arguments) as trial:
            trial.run()
        code = int(report.failed)
    except Nothing as missing:
        report.say(None, "machine", str(missing))
        code = 2
    except KeyboardInterrupt:
        report.step("interrupted; everything was stopped and removed")
        code = 130
    except (StartError, CommandFailed, ImageError, NgpuError, httpx.HTTPError) as error:
        report.say(False, "trial", f"{type(error).__name__}: {error}")
    if arguments.json:
        text = json.dumps({"exit": code, "lines": report.lines}, indent=1) + "\n"
        if arguments.json == "-":
            print(text, end="")
        else:
            Path(arguments.json).write_text(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
