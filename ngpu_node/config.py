"""The owner's configuration: every key, its default and what it means.

`ngpu-node sample-config` prints this file's descriptions as TOML. What can be wrong with a value by itself is refused
here; what depends on the machine (a port in use, an engine that does not answer) when the daemon starts.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from ngpu_daemon.discovery_settings import DiscoverySettings
from ngpu_daemon.logs import LogFormat
from ngpu_daemon.settings import DaemonSettings, Section
from ngpu_node.errors import NodeConfigurationError
from ngpu_node.schedule import Span
from ngpu_node.trust import Trust, TrustedBootstrap
from ngpu_protocol.errors import AddressError, NetworkNameError
from ngpu_protocol.identity import Address, address_of_peer_id, parse_address
from ngpu_protocol.image_references import ImageReferenceError, parse_image_reference
from ngpu_protocol.networks import network_named
from ngpu_protocol.prices import Prices

ENV_PREFIX = "NGPU_NODE_"
DEFAULT_DATA_DIR = Path("/var/lib/ngpu-node")

MIB = 1024 * 1024
GIB = 1024 * MIB


def _network(name: str) -> str:
    try:
        network_named(name)
    except NetworkNameError as error:
        raise ValueError(str(error)) from None
    return name


def _span(text: str) -> str:
    Span.parse(text)
    return text


def _loopback(text: str) -> str:
    host, port = split_listen(text)
    if not ipaddress.ip_address(host).is_loopback:
        raise ValueError(f"{host} is not a loopback address: whatever reaches this port is trusted")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_listen(text: str) -> tuple[str, int]:
    """Return host and port of `127.0.0.1:4912` or `[::1]:4912`.

    Raises:
        ValueError: it is something else.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("write an address and a port, such as 127.0.0.1:4912")
    host = host.removeprefix("[").removesuffix("]")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"{host!r} is not an IP address") from None
    return host, int(port)


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bootstrap_url(text: str) -> str:
    try:
        url = urlsplit(text)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        valid = False
    if valid and url.scheme == "http" and not _is_this_machine(url.hostname or ""):
        raise ValueError(f"{text!r} would send the owner's token in clear: use https beyond this machine")
    if not valid or url.username is not None or url.query or url.fragment or url.path not in ("", "/"):
        raise ValueError(f"{text!r} is not the address of a bootstrap, such as https://bootstrap.example.org")
    return text.rstrip("/")


LoopbackListen = Annotated[str, AfterValidator(_loopback)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
Bytes = Annotated[int, Field(ge=1)]


class BootstrapEntry(Section):
    """One trusted bootstrap."""

    multiaddrs: list[str] = Field(
        min_length=1,
        description="Where it listens, each address ending in its PeerId; tried in this order.",
        examples=[["/ip4/192.0.2.1/tcp/4910/p2p/16Uiu2HAm..."]],
    )
    address: str = Field(
        default="",
        description="Its account address. May be left out: it follows from the PeerId, with which it must agree.",
    )
    service: str = Field(
        default="",
        max_length=128,
        description="A word for whoever runs it. Bootstraps of one operator on one store bear the same word: they may\n"
        "ask for each other's tasks. Left out, the bootstrap stands alone.",
    )

    @field_validator("multiaddrs")
    @classmethod
    def _name_their_peer(cls, values: list[str]) -> list[str]:
        peers = {_peer_of(value) for value in values}
        if len(peers) > 1:
            raise ValueError("the addresses name different peers: write one [[bootstraps]] for each")
        return values

    @model_validator(mode="after")
    def _agrees(self) -> BootstrapEntry:
        if self.address:
            try:
                stated = parse_address(self.address)
            except AddressError as error:
                raise ValueError(f"address: {error}") from None
            if stated != _peer_of(self.multiaddrs[0]):
                raise ValueError(f"address {stated} is not that of the PeerId in multiaddrs")
        return self

    def trusted(self) -> TrustedBootstrap:
        """Return what the rest of the node works with."""
        address = _peer_of(self.multiaddrs[0])
        return TrustedBootstrap(address, tuple(self.multiaddrs), self.service or address)


def _peer_of(multiaddr: str) -> Address:
    if not multiaddr.startswith("/") or "/p2p/" not in multiaddr:
        raise ValueError(f"{multiaddr!r} is not a multiaddr such as /ip4/192.0.2.1/tcp/4910/p2p/16Uiu2HAm...")
    try:
        return address_of_peer_id(multiaddr.rpartition("/p2p/")[2])
    except AddressError as error:
        raise ValueError(f"{multiaddr!r}: {error}") from None


class Limits(Section):
    """What tasks may cost this machine."""

    body_bytes: Bytes = Field(default=GIB, description="Largest request body that is passed to a workspace.")
    spool_answer_bytes: Bytes = Field(
        default=64 * MIB, description="Largest answer of a detached (asynchronous) task that is kept for its bootstrap."
    )
    spool_total_bytes: Bytes = Field(
        default=GIB, description="All such answers together; each is kept for 24 h at most."
    )


class ContainerSettings(Section):
    """How workspaces run on the container engine."""

    network: Literal["auto", "internal", "published"] = Field(
        default="auto",
        description="internal: containers have no way out, the node talks to their own addresses (the engine must\n"
        "run on this machine). published: the engine publishes their ports on loopback, and they reach the\n"
        "outside. auto: internal where that works, else published.",
    )
    egress: bool = Field(
        default=True,
        description="Whether a workspace that asks for it may reach the outside: the internet, never this machine or\n"
        "private networks. Others have no way out.",
    )
    name_servers: list[str] = Field(
        default=["1.1.1.1", "9.9.9.9"],
        description="Whom workspaces with egress ask for names. Private addresses are out of their reach.",
    )
    memory_bytes: Bytes = Field(default=8 * GIB, description="Memory of a workspace that does not say how much.")
    cpus: Annotated[float, Field(gt=0)] = Field(
        default=2.0, description="CPUs of a workspace that does not say how many."
    )
    total_memory_bytes: Bytes | None = Field(
        default=None,
        description="Memory of all workspaces together. Left out: no limit but the machine's.",
        examples=[64 * GIB],
    )
    total_cpus: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="CPUs of all workspaces together. Left out: no limit; they share what there is.",
        examples=[16.0],
    )
    pids: Annotated[int, Field(ge=16)] = Field(default=512, description="Processes and threads a workspace may have.")
    log_bytes: Annotated[int, Field(ge=64 * 1024)] = Field(
        default=10 * MIB, description="Size at which a workspace's log begins anew; the one before is kept too."
    )
    volume_bytes: Bytes = Field(
        default=100 * GIB,
        description="What the volumes of one workspace may take together. They are measured every minute; a workspace\n"
        "that has more stops.",
    )
    start_timeout_s: Seconds = Field(
        default=3600, description="Most a workspace may take until it answers HTTP, whatever it asks for itself."
    )


class ImageSettings(Section):
    """Which images are taken, from where, and how much of the disk they get."""

    registries: list[str] = Field(
        default=[],
        description="Registries that images may come from, each as in a reference: docker.io, ghcr.io,\n"
        "registry.example:5000. Empty: any at a public address. One that is listed may also be at an address of\n"
        "this machine or its network.",
        examples=[["docker.io", "registry.lan:5000"]],
    )
    tar_images: bool = Field(
        default=True, description="Whether images may also come from URLs of files made by `docker save`."
    )
    private_addresses: bool = Field(
        default=False,
        description="Whether URLs and registries that are not listed may lead to addresses of this machine or its\n"
        "network. Clients choose them: true lets clients reach into that network.",
    )
    local_images: bool = Field(
        default=True,
        description="Whether a workspace may use any image that is on the engine already, whoever put it there.",
    )
    max_image_bytes: Bytes | None = Field(
        default=None,
        description="Largest image that is fetched, as its registry holds it (compressed). Left out: any that fits.",
        examples=[20_000_000_000],
    )
    total_bytes: Bytes | None = Field(
        default=None,
        description="What all images this node fetched may take together, unpacked. Left out: what fits.",
        examples=[200_000_000_000],
    )
    disk_reserve_bytes: Annotated[int, Field(ge=0)] = Field(
        default=10 * GIB,
        description="What stays free on the engine's disk: no image is fetched that would not leave it, and images\n"
        "nothing uses are removed when it is touched, least recently used first.",
    )
    keep: list[str] = Field(
        default=[],
        description="Images that are never removed once this node fetched them.",
        examples=[["vllm/vllm-openai:v0.9.0"]],
    )
    stall_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        default=60, description="A pull that moves no byte for so long is broken off, and tried again."
    )
    timeout_s: Annotated[float, Field(gt=0, le=604_800)] = Field(
        default=3600, description="How long getting an image may take in all, with every try."
    )
    parallel: Annotated[int, Field(ge=1, le=64)] = Field(
        default=2, description="Images fetched at once; more wait their turn."
    )

    @field_validator("registries")
    @classmethod
    def _are_hosts(cls, values: list[str]) -> list[str]:
        return [_registry(value) for value in values]


def _registry(text: str) -> str:
    name = text.lower() if text.lower() in ("docker.io", "index.docker.io") else text
    try:
        domain = parse_image_reference(f"{name}/a/b").domain
    except ImageReferenceError as error:
        raise ValueError(str(error)) from None
    if domain not in (name, "docker.io") or (domain == "docker.io" and "docker.io" not in name):
        raise ValueError(f"{text!r} is not the host of a registry, such as ghcr.io or registry.lan:5000")
    return domain


class GpuSettings(Section):
    """Which of this machine's GPUs are offered."""

    withhold: list[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]] = Field(
        default=[],
        description="GPUs that are never offered: each a UUID or its beginning, a PCI address, or a model.",
        examples=[["GPU-b778b9a9", "0000:41:00.0", "RTX 4090"]],
    )
    withhold_memory_bytes: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Memory of every GPU that is not offered with it."
    )
    shares_per_gpu: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1,
        description="Workspaces that may hold one GPU at a time. With more than one, each counts on its part of the\n"
        "memory, and nothing on the card keeps it to that.",
    )


class ModelSettings(Section):
    """Model servers on this machine."""

    output_folders: list[Path] = Field(
        default=[],
        description="Folders of files that models' answers name by their path: bootstraps this node trusts may fetch "
        "what lies below them. None: no such file leaves.",
        examples=[["/home/AI_project/ImageGenerationAI/photos"]],
    )

    @field_validator("output_folders")
    @classmethod
    def _narrow(cls, folders: list[Path]) -> list[Path]:
        for folder in folders:
            if not folder.is_absolute() or len(folder.resolve().parts) < 3:
                raise ValueError(f"{folder} must be absolute, and not / or a folder directly below it")
        return folders


class GatewaySettings(Section):
    """Where calls of programs on this machine go that other nodes are to run."""

    bootstrap_url: Annotated[str, AfterValidator(_bootstrap_url)] | None = Field(
        default=None,
        description="HTTP address of a bootstrap that runs the calls to /api/v0/chat/completion and its siblings, as\n"
        "calls of the owner's workspace. Left out: they are refused.",
        examples=["https://bootstrap.example.org"],
    )
    token_file: Path | None = Field(
        default=None,
        description="File with the workspace token those calls are made under, which nobody else may read. Every\n"
        "program on this machine can spend it through this node.",
        examples=["/etc/ngpu/node.token"],
    )

    @model_validator(mode="after")
    def _both_or_neither(self) -> GatewaySettings:
        if (self.bootstrap_url is None) != (self.token_file is None):
            raise ValueError("bootstrap_url and token_file go together")
        return self

    def token(self) -> str:
        """Return the token; empty where none is named.

        Raises:
            NodeConfigurationError: the file cannot be read, others may read it, or it holds no token.
        """
        path = self.token_file
        if path is None:
            return ""
        try:
            mode, text = path.stat().st_mode, path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
            raise NodeConfigurationError(f"gateway.token_file: cannot read {path}: {reason}") from None
        if mode & 0o077:
            raise NodeConfigurationError(f"gateway.token_file: others may read {path}: chmod 600 it")
        if not 1 <= len(text) <= 512 or not text.isprintable() or " " in text:
            raise NodeConfigurationError(f"gateway.token_file: {path} does not hold a workspace token")
        return text


class PriceSettings(Section):
    """What this machine's owner asks. Used to total receipts, by both sides alike, and for nothing else."""

    currency: str = Field(
        default="",
        description="The unit of the prices below, in any word: a currency, a token, credits.",
        examples=["USD"],
    )
    per_second: dict[str, str] = Field(
        default={},
        description="What a second of billed GPU time costs, by model, as decimal text: it is never rounded. A model\n"
        "without a price is not totalled. A change holds from the next start of the node.",
        examples=[{"RTX 4090": "0.00012", "H100": "0.0009"}],
    )

    @model_validator(mode="after")
    def _is_a_list(self) -> PriceSettings:
        Prices.of_models(self.currency, self.per_second)
        if self.per_second and not self.currency:
            raise ValueError('say in which currency the prices are: currency = "USD"')
        return self

    def prices(self) -> Prices | None:
        """Return the list, None where the owner asks nothing."""
        return Prices.of_models(self.currency, self.per_second) if self.per_second else None


class NodeSettings(DaemonSettings):
    """Everything an owner can say."""

    data_dir: Path = Field(
        default=DEFAULT_DATA_DIR,
        description="Where the node keeps its keystore, its ledger and its admin socket. One daemon at a time.",
    )
    passphrase_file: Path | None = Field(
        default=None,
        description="File with the keystore's passphrase. Left out: the systemd credential `passphrase`, else it is\n"
        "asked for on the terminal.",
        examples=["/etc/ngpu/node.passphrase"],
    )
    network: Annotated[str, AfterValidator(_network)] = Field(
        default="main",
        description="Which network this node belongs to: main, test, local, or a name of one's own.\n"
        "Nothing signed on one means anything on another.",
    )
    listen: list[str] = Field(
        default=["/ip4/0.0.0.0/tcp/4911"],
        description="Where other peers reach this node. It also works behind NAT, through the connections it dials.",
    )
    bootstraps: list[BootstrapEntry] = Field(
        default=[], description="The bootstraps whose orders this node runs. It dials each and stays connected."
    )
    region: Annotated[str, Field(max_length=64)] = Field(
        default="",
        description="Where this node is, in a word of the owner's; others can look for it.",
        examples=["eu-central"],
    )
    terms: Annotated[str, Field(max_length=256)] = Field(
        default="",
        description="The owner's terms, or where to read them; they stand in the node's public record.",
        examples=["https://gpu.example.org/terms"],
    )
    slots: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=256, description="Tasks this node runs at once, over all workspaces."
    )
    model_listen: LoopbackListen = Field(
        default="127.0.0.1:4912",
        description="Where model servers on this machine register (POST /api/v0/ai/model/register). Loopback only;\n"
        "port 0 takes a free one, to be found in <data_dir>/node.json.",
    )
    model_hosts: list[str] = Field(
        default=[],
        description="IP addresses beyond this machine, each with or without :port, whose model servers may register.",
    )
    metrics_listen: LoopbackListen | None = Field(
        default=None,
        description="Where Prometheus may ask for /metrics, such as 127.0.0.1:4913. They are on the admin socket too.",
        examples=["127.0.0.1:4913"],
    )
    engine: Literal["auto", "docker", "none"] = Field(
        default="auto",
        description="Container engine for workspaces that are images (DOCKER_HOST is respected). auto: docker where\n"
        "it answers, now or later; docker: do not start without it; none: serve registered model servers only.",
    )
    serve: list[Annotated[str, AfterValidator(_span)]] = Field(
        default=[],
        description="When this machine is lent, in local time. Outside these hours it takes nothing, lets running\n"
        "tasks end within drain_s, and its GPUs are free. Days may come before the hours. Left out: always.",
        examples=[["22:00-08:00", "sat,sun 00:00-24:00"]],
    )
    drain_s: Seconds = Field(
        default=30, description="How long running tasks may go on after SIGTERM before they are ended."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Lowest level logged.")
    log_format: LogFormat = Field(
        default="auto", description="auto, json or console; auto is JSON except on a terminal."
    )
    limits: Limits = Field(default=Limits(), description="What a task may cost this machine.")
    models: ModelSettings = Field(default=ModelSettings(), description="Model servers on this machine.")
    gpus: GpuSettings = Field(default=GpuSettings(), description="Which of this machine's GPUs are offered.")
    prices: PriceSettings = Field(default=PriceSettings(), description="What a second of each GPU model costs.")
    containers: ContainerSettings = Field(
        default=ContainerSettings(), description="How workspaces run on the container engine."
    )
    discovery: DiscoverySettings = Field(
        default=DiscoverySettings(), description="How this node is found by others than its bootstraps."
    )
    images: ImageSettings = Field(
        default=ImageSettings(), description="Which images are taken, from where, and how much disk they get."
    )
    gateway: GatewaySettings = Field(
        default=GatewaySettings(), description="Where this machine's own calls to other nodes go."
    )

    @field_validator("bootstraps")
    @classmethod
    def _each_once(cls, values: list[BootstrapEntry]) -> list[BootstrapEntry]:
        addresses = [entry.trusted().address for entry in values]
        if len(set(addresses)) != len(addresses):
            raise ValueError("a bootstrap is listed twice: give it one entry with all its multiaddrs")
        return values

    @field_validator("listen")
    @classmethod
    def _look_like_multiaddrs(cls, values: list[str]) -> list[str]:
        for value in values:
            if not value.startswith("/"):
                raise ValueError(f"{value!r} is not a multiaddr such as /ip4/0.0.0.0/tcp/4911")
        return values

    def trust(self) -> Trust:
        """Return the trusted bootstraps."""
        return Trust(entry.trusted() for entry in self.bootstraps)
