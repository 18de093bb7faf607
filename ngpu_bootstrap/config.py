"""The configuration of `ngpu-bootstrap`: every key, its default and what it means.

Owns the keys and the rules between them; where values come from is `ngpu_daemon.settings`. The one rule that is about
safety: a listener others can reach needs TLS, or an operator who says that a proxy in front of it has TLS.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ngpu_bootstrap.front.wire_times import parse_zone
from ngpu_bootstrap.scheduling.reasons import Policy
from ngpu_daemon.discovery_settings import DiscoverySettings
from ngpu_daemon.settings import DaemonSettings, Section
from ngpu_protocol.errors import AddressError, NetworkNameError
from ngpu_protocol.identity import parse_address
from ngpu_protocol.networks import network_named

ENV_PREFIX = "NGPU_BOOTSTRAP_"
DEFAULT_DATA_DIR = Path("~/.ngpu/bootstrap")
# In the data directory, while a daemon runs there: where it listens.
RUNTIME_FILE = "bootstrap.json"
MIB = 1024 * 1024

_HOST_PORT = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>[0-9]{1,5})")


def parse_host_port(text: str) -> tuple[str, int]:
    """Return host and port of `127.0.0.1:8080` or `[::1]:8080`; port 0 lets the system choose one.

    Raises:
        ValueError: neither form.
    """
    matched = _HOST_PORT.fullmatch(text)
    if matched is None or int(matched["port"]) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080")
    return matched["v6"] or matched["host"], int(matched["port"])


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a listener on *host*."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_host_port(text: str) -> str:
    parse_host_port(text)
    return text


def _checked_network(name: str) -> str:
    try:
        return network_named(name).name
    except NetworkNameError as error:
        raise ValueError(str(error)) from None


def _checked_address(text: str) -> str:
    try:
        return parse_address(text)
    except AddressError as error:
        raise ValueError(str(error)) from None


def _checked_proxy(text: str) -> str:
    ipaddress.ip_network(text, strict=False)
    return text


def _checked_zone(text: str) -> str:
    parse_zone(text)
    return text


HostPort = Annotated[str, AfterValidator(checked_host_port)]
NetworkName = Annotated[str, AfterValidator(_checked_network)]
NodeAddress = Annotated[str, AfterValidator(_checked_address)]
ProxyAddress = Annotated[str, AfterValidator(_checked_proxy)]
WireZone = Annotated[str, AfterValidator(_checked_zone)]


class TlsSection(Section):
    """The certificate of the clients' listener."""

    certificate: Path | None = Field(None, description="PEM file with the certificate chain. Empty: no TLS.")
    key: Path | None = Field(None, description="PEM file with its private key.")

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together: give both or neither")
        return self


class AdmissionSection(Section):
    """Which nodes may serve this bootstrap."""

    mode: Literal["open", "approved"] = Field("open", description='"open" admits any node, "approved" those listed.')
    approved: tuple[NodeAddress, ...] = Field((), description="nodeAddr of each approved node.")


class RelaySection(Section):
    """Reaching nodes behind NAT through this bootstrap."""

    enabled: bool = Field(True, description="Let admitted nodes that cannot be dialled be reached through here.")
    reservations: int = Field(1024, ge=1, le=65536, description="Nodes that may have a place at once.")
    circuit_bytes: int = Field(1 * MIB, ge=16_384, description="Bytes each way that one relayed connection may carry.")
    circuit_s: int = Field(120, ge=5, le=3600, description="Seconds one relayed connection may last.")


class Brc20Section(Section):
    """Who is asked what BTC addresses hold."""

    indexer: Literal["", "unisat", "hiro"] = Field(
        "", description="Service that knows BRC-20 balances: unisat or hiro. Empty: nobody is asked."
    )
    url: str = Field("", description="Its base URL. Empty: the service's own.", examples=["https://open-api.unisat.io"])
    key_file: Path | None = Field(None, description="File with the API key, readable by nobody else.")
    network: Literal["mainnet", "testnet", "regtest"] = Field("mainnet", description="Whose addresses are looked up.")
    ticker: str = Field("AINN", min_length=1, max_length=16, description="The asset meant where nobody names one.")
    timeout_s: float = Field(5.0, gt=0, le=60, description="Seconds one look-up may take.")
    cache_s: float = Field(60.0, ge=0, description="Seconds a balance is remembered.")
    cache_size: int = Field(4096, ge=1, description="Balances remembered at most.")
    at_once: int = Field(8, ge=1, le=256, description="Addresses looked up at once.")
    checks_per_minute: int = Field(60, ge=1, description="Checks of one client's address at /brc20/checkAddress.")

    @model_validator(mode="after")
    def _url_is_one(self) -> Self:
        if self.url and not self.url.startswith(("https://", "http://")):
            raise ValueError("brc20.url must start with https:// (or http:// for an indexer of your own)")
        return self


class ImagesSection(Section):
    """Images that clients give as the URL of a file, read once by this bootstrap for their checksum."""

    private_addresses: bool = Field(False, description="Read from addresses of this machine's own network too.")
    archive_bytes: int = Field(64 * 1024 * MIB, ge=1, description="Largest such file that is read.")
    archive_timeout_s: float = Field(7200.0, gt=0, description="Seconds the reading of one may take.")


class CompatSection(Section):
    """What clients written for other gateways may call."""

    ngpu_cloud: bool = Field(
        False, description="Serve what clients of the NGPU cloud call: accounts, images, products, node lists."
    )
    session_days: float = Field(7.0, gt=0, le=365, description="Days a login of such a client lasts.")


class PublicSection(Section):
    """A profile that clients may call without a credential."""

    workspace: str = Field(..., pattern=r"^[1-9][0-9]{0,18}$", description="Workspace that such calls are made for.")
    calls_per_minute: int = Field(30, ge=1, description="Calls a minute of one client's address.")
    at_once: int = Field(8, ge=1, description="Calls without a credential running at once, all clients together.")
    queue: int = Field(100, ge=0, description="Calls without a credential that may wait for one of those places.")
    queue_wait_s: float = Field(30.0, ge=0, description="Seconds one may wait there before it gets 429.")


class ProfilesSection(Section):
    """Families of calls that other systems' clients make, declared in TOML."""

    enabled: tuple[str, ...] = Field(
        ("openai", "aimodel", "akashgen", "sensetime"),
        description="Profiles in use, shipped ones and those of files; the first that declares a call answers it.",
    )
    files: tuple[Path, ...] = Field((), description="Files with profiles of your own.")
    settings: dict[str, dict[str, int | float | str | bool]] = Field(
        {}, description="What profiles leave to you, by profile: [profiles.settings.NAME]."
    )
    bind: dict[str, str] = Field({}, description='The workspace that a profile with workspace = "bound" runs on.')
    listen: dict[str, HostPort] = Field({}, description="Listeners of their own for profiles, by name: HOST:PORT.")
    public: dict[str, PublicSection] = Field(
        {}, description="Profiles that may be called without a credential: [profiles.public.NAME]."
    )


class ModelsSection(Section):
    """Models that nodes serve."""

    share: Literal["registered", "none"] = Field(
        "registered", description="registered: any token may call a model server that an admitted node registered."
    )
    projects: tuple[str, ...] = Field((), description="Projects whose models are shared. Empty: all.")
    shared_models: int = Field(
        1000,
        ge=1,
        description="Models shared at most; one node alone brings half as many.",
    )
    concurrency: int = Field(64, ge=1, le=4096, description="Calls at once of one shared model on one node.")
    timeout_s: float = Field(600.0, gt=0, le=86_400, description="Seconds one call of a shared model may take.")
    public_url: str = Field(
        "", description="URL of this bootstrap as its clients know it, for URLs in answers. Empty: as they call it."
    )
    file_urls_s: float = Field(3600.0, gt=0, description="Seconds the URL of a model's file is good.")
    file_bytes: int = Field(256 * MIB, ge=1, description="Largest such file that is passed on.")


class LimitsSection(Section):
    """Bounds on what clients and nodes may take."""

    request_body_bytes: int = Field(256 * MIB, ge=1, description="Largest body of a /proxy/ call.")
    task_body_bytes: int = Field(
        16 * MIB, ge=1, description="Largest body of a /user/ call; it is stored with the task."
    )
    task_answer_bytes: int = Field(
        64 * MIB, ge=1, description="Largest answer of a /user/ call; it is stored with the task."
    )
    api_body_bytes: int = Field(1 * MIB, ge=1, description="Largest body of an /api/ call.")
    connections: int = Field(1024, ge=1, description="Clients' connections open at once.")
    queued_calls: int = Field(256, ge=0, description="Calls of one workspace that may wait for a slot at once.")
    queue_wait_s: float = Field(30.0, ge=0, description="Seconds a call may wait for a slot before it gets 429.")
    async_tasks: int = Field(10_000, ge=1, description="Asynchronous tasks of one workspace that may be unfinished.")
    attempts: int = Field(5, ge=1, le=32, description="Orders signed for one task at most, refused ones included.")
    spool_bytes: int = Field(
        4096 * MIB, ge=1 * MIB, description="Disk that long bodies may take while a model is looked for in them."
    )
    token_calls_per_s: float = Field(0.0, ge=0, description="Calls a second of one token; 0 sets no limit.")
    token_burst: int = Field(50, ge=1, description="Calls one token may make at once after a pause.")
    token_calls_at_once: int = Field(0, ge=0, description="Calls of one token running at once; 0 sets no limit.")
    streams_per_node: int = Field(256, ge=1, description="HTTP streams to one node open at once.")


class RetentionSection(Section):
    """How long tasks are kept. Receipts are kept for ever; a task that has not ended is never removed."""

    days: float = Field(90.0, ge=0, description="Days a task is kept after it was accepted. 0: for ever.")
    bodies_bytes: int = Field(
        64 * 1024 * MIB, ge=0, description="Bytes that requests and answers may take together; beyond it the oldest go."
    )


class WebhooksSection(Section):
    """Clients that are called back when a task of theirs has ended."""

    enabled: bool = Field(True, description="Whether clients may name a URL to call back.")
    allow: tuple[ProxyAddress, ...] = Field(
        (), description="Addresses or networks that may be called though they are not public."
    )


class SchedulingSection(Section):
    """Which nodes get tasks, beyond those that are ready."""

    minimum_version: str = Field(
        "", pattern=r"^(\d{1,6}(\.\d{1,6}){0,3})?$", description="Nodes with older software get no tasks. Empty: any."
    )
    max_round_trip_ms: int = Field(0, ge=0, description="Nodes further away get no tasks. 0 sets no limit.")
    affinity_keys: int = Field(
        8192, ge=0, description="Ngpu-Affinity keys of one workspace remembered at once; 0: none sticks."
    )
    affinity_idle_s: float = Field(3600.0, gt=0, description="Seconds after its last use that such a key sticks.")
    kept_keys: int = Field(
        100_000, ge=1, description="Keys of one workspace kept in the database, of calls that a profile holds together."
    )
    kept_keys_days: float = Field(30.0, gt=0, description="Days after its last use that such a key is kept.")

    @property
    def policy(self) -> Policy:
        """What scheduling is told of it."""
        return Policy(
            minimum_version=tuple(int(part) for part in self.minimum_version.split(".") if part),
            max_round_trip_s=self.max_round_trip_ms / 1000 if self.max_round_trip_ms else None,
        )


class GpuSpeed(Section):
    """A GPU model and what it can do, beside those that are known."""

    model: str = Field(description="The model, as NVML or people spell it.", examples=["RTX 4070"], min_length=1)
    tflops: float = Field(
        gt=0, description="Multiplications and additions a second in matrix products, 32-bit or TF32.", examples=[29.1]
    )
    gbytes_per_s: float = Field(gt=0, description="From and to its own memory, gigabytes a second.", examples=[504.0])
    memory_gib: int = Field(0, ge=0, description="The most such a card has. 0: not known.")


class ChallengesSection(Section):
    """Whether nodes must show that their GPUs are what they claim (docs/trust.md)."""

    workspaces: tuple[str, ...] = Field(
        (),
        description="Ids of workspaces that answer challenges (examples/challenge), of one GPU or of more. Empty: no\n"
        "node is challenged.",
    )
    automatic: bool = Field(
        True, description="Challenge nodes when they are due. false: only by `ngpu-bootstrap challenge`."
    )
    interval_s: float = Field(86_400.0, gt=0, description="About how often a trusted node is challenged.")
    suspect_interval_s: float = Field(3600.0, gt=0, description="How often one that failed, or is new, is challenged.")
    at_once: int = Field(8, ge=1, le=64, description="Nodes of one GPU model challenged at the same moment at most.")
    memory_part: float = Field(0.85, gt=0, le=0.95, description="Part of the claimed memory that the product fills.")
    depth: int = Field(
        16_384, ge=8, le=131_072, multiple_of=8, description="Length of the scalar products: the deeper, the longer."
    )
    steps: int = Field(256, ge=1, le=65_536, description="Reads of each chain through the product.")
    tolerance: float = Field(
        1.0,
        ge=1.0,
        le=100.0,
        description="Times the limit that a claimed model's figures give. More lets slower cards by.",
    )
    idle_wait_s: float = Field(60.0, ge=0, description="Seconds a node's running tasks may take to end before.")
    deploy_wait_s: float = Field(1800.0, gt=0, description="Seconds the challenge's image may take to be ready there.")
    speeds: tuple[GpuSpeed, ...] = Field((), description="Models beside those that are known, or instead of them.")

    @model_validator(mode="after")
    def _intervals_fit(self) -> Self:
        if self.suspect_interval_s > self.interval_s:
            raise ValueError("challenges.suspect_interval_s must not be longer than challenges.interval_s")
        return self


class RechecksSection(Section):
    """Tasks run again on other nodes, of workspaces that say they are deterministic (docs/trust.md)."""

    enabled: bool = Field(True, description="Whether such tasks are run again at all. No client pays for it.")
    often: float = Field(0.2, ge=0, le=1, description="Share of a new node's tasks that is run again.")
    rare: float = Field(0.02, ge=0, le=1, description="Share of a trusted node's.")
    disputed: float = Field(0.5, ge=0, le=1, description="Share of a node's that was disputed of late.")
    least_a_day: float = Field(4.0, ge=0, description="About so many of each node's, where it has as many.")
    queue: int = Field(256, ge=1, le=65_536, description="Tasks that may wait to be run again; others are passed over.")
    queue_bytes: int = Field(64 * MIB, ge=0, description="Bytes their requests may take together.")
    body_bytes: int = Field(1 * MIB, ge=0, description="Largest request that is kept for it.")
    wait_s: float = Field(600.0, gt=0, description="Seconds such a task waits for a node that may judge.")
    outvoted_s: float = Field(
        172_800.0, gt=0, description="Seconds a node that two others contradicted gets no tasks of that workspace."
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if not self.rare <= self.often:
            raise ValueError("rechecks.rare must not be more than rechecks.often")
        return self


class BootstrapSettings(DaemonSettings):
    """Everything `ngpu-bootstrap run` can be told."""

    data_dir: Path = Field(
        DEFAULT_DATA_DIR, description="Where this bootstrap keeps its key, its tasks and its socket."
    )
    passphrase_file: Path | None = Field(
        None, description="File with the passphrase of the keystore. Under systemd use LoadCredential=passphrase:."
    )
    network: NetworkName = Field("main", description="Network: main, test, local, or your own name.")
    service: str = Field("", description="Name of the service this bootstrap is one of, as in nodes' trust files.")
    listen: tuple[str, ...] = Field(
        ("/ip4/0.0.0.0/tcp/4910",),
        description="Multiaddrs on which nodes reach this bootstrap. IPv4's wildcard and loopback mean IPv6's as well.",
    )
    http_listen: HostPort = Field(
        "127.0.0.1:8080", description="Where clients reach this bootstrap. Beyond loopback: TLS, or behind_proxy."
    )
    behind_proxy: bool = Field(False, description="A proxy in front of http_listen terminates TLS.")
    trusted_proxies: tuple[ProxyAddress, ...] = Field(
        (), description="Addresses or networks of proxies whose X-Forwarded-For is believed."
    )
    store: str = Field("", description="Database URL. Empty: SQLite in data_dir.", examples=["postgresql://host/ngpu"])
    siblings: tuple[NodeAddress, ...] = Field(
        (),
        description="Addresses of the other bootstraps of a PostgreSQL database. What clients confide for their "
        "workspaces is sealed to them too, so that each can run every workspace; and this one signs that they may "
        "acknowledge receipts of its orders while it is away.",
    )
    wire_timezone: WireZone = Field(
        "UTC+8", description="Zone of task ids and of the times in /user/ answers and queries, as UTC+8 or UTC-03:30."
    )
    submit_result_code: Literal[100, 200] = Field(
        200,
        description="result_code of an accepted submission: 200 as clients expect, 100 for those that follow the "
        "documents' example.",
    )
    show_node_ip: bool = Field(True, description="Whether getDetailed shows where the node's connection came from.")
    async_deadline_s: float = Field(
        21_600.0, gt=0, description="Seconds an asynchronous task may wait and run altogether before it expires."
    )
    heartbeat_s: float = Field(2.0, gt=0, le=4, description="How often nodes report when nothing changes.")
    clock_tolerance_s: float = Field(
        5.0, ge=0, description="How far a node's clock may be off before it counts as skew."
    )
    replace_node_after_s: float = Field(
        300.0, ge=0, description="Seconds a node that is away or draining keeps its workspaces before others get them."
    )
    drain_s: float = Field(25.0, ge=0, description="Seconds running tasks may take to end after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: JSON unless on a terminal.")
    bodies: Path | None = Field(
        None,
        description="Folder for requests and answers over 64 KiB, shared by all bootstraps of a PostgreSQL database. "
        "Empty: beside a SQLite file; in a PostgreSQL database itself.",
    )
    tls: TlsSection = Field(TlsSection(), description="TLS of the clients' listener.")
    images: ImagesSection = Field(ImagesSection(), description="Images given as the URL of a file.")
    admission: AdmissionSection = Field(AdmissionSection(), description="Which nodes may serve this bootstrap.")
    brc20: Brc20Section = Field(Brc20Section(), description="Who is asked what BTC addresses hold.")
    retention: RetentionSection = Field(RetentionSection(), description="How long tasks are kept.")
    webhooks: WebhooksSection = Field(WebhooksSection(), description="Calling clients back.")
    scheduling: SchedulingSection = Field(SchedulingSection(), description="Which nodes get tasks.")
    profiles: ProfilesSection = Field(ProfilesSection(), description="Calls of other systems' clients, as declared.")
    models: ModelsSection = Field(ModelsSection(), description="Models that nodes serve.")
    challenges: ChallengesSection = Field(
        ChallengesSection(), description="Whether nodes must show that their GPUs are what they claim."
    )
    rechecks: RechecksSection = Field(RechecksSection(), description="Tasks that are run again on other nodes.")
    compat: CompatSection = Field(CompatSection(), description="What clients written for other gateways may call.")
    limits: LimitsSection = Field(LimitsSection(), description="Bounds on what clients and nodes may take.")
    region: str = Field("", max_length=64, description="Where this bootstrap is, in a word; stands in its record.")
    discovery: DiscoverySettings = Field(
        DiscoverySettings(), description="How this bootstrap is found, and finds others."
    )
    relay: RelaySection = Field(RelaySection(), description="Reaching nodes behind NAT through this bootstrap.")

    @model_validator(mode="after")
    def _listener_is_safe(self) -> Self:
        own = {f"profiles.listen.{name}": listen for name, listen in self.profiles.listen.items()}
        for key, listen in {"http_listen": self.http_listen, **own}.items():
            host, _ = parse_host_port(listen)
            if is_loopback(host) or self.tls.certificate is not None or self.behind_proxy:
                continue
            raise ValueError(
                f"{key} {listen} can be reached from outside and would carry tokens in the clear: "
                "set tls.certificate and tls.key, or behind_proxy = true, or listen on 127.0.0.1"
            )
        return self

    @property
    def has_private_listener(self) -> bool:
        """Whether whoever reaches `http_listen` is on this machine (a proxy's clients are not)."""
        return is_loopback(parse_host_port(self.http_listen)[0]) and not self.behind_proxy
