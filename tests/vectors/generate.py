"""Golden vectors of the wire: what any implementation must reproduce byte for byte.

`python -m tests.vectors.generate` writes the JSON files beside this one; a test compares them with what the code
makes, so a change of the wire shows up as a change of these files in review. Keys here are public: never use them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ngpu_protocol.acknowledgements import (
    ACKNOWLEDGEMENT_TYPE,
    Acknowledgement,
    SignedAcknowledgement,
    VerdictKind,
    sign_acknowledgement,
)
from ngpu_protocol.bills import (
    BILL_TYPE,
    NO_SESSION,
    Basis,
    Bill,
    BillPart,
    amounts_of,
    amounts_text,
    leaves_of,
    sign_bill,
)
from ngpu_protocol.capabilities import Capability, capability_key, epoch_at, shard_of
from ngpu_protocol.control import (
    Ack,
    Bye,
    DeploymentPhase,
    DeploymentState,
    Desired,
    Gap,
    GpuOffer,
    Head,
    Heartbeat,
    Hello,
    HostOffer,
    Offer,
    Refused,
    ServiceOffer,
    Welcome,
    encode_message,
)
from ngpu_protocol.dispute_file import Contradiction, Dispute, Kind, Withheld, to_document
from ngpu_protocol.gap_claims import ClaimedGap, sign_gap_claim
from ngpu_protocol.identity import Account, gpu_id, keccak
from ngpu_protocol.losses import LOSS_TYPE, JobLoss, LossFile, sign_loss
from ngpu_protocol.merkle import tree_root
from ngpu_protocol.networks import network_named
from ngpu_protocol.node_bindings import NODE_BINDING_TYPE, NodeBinding, sign_node_binding
from ngpu_protocol.node_records import (
    DEFAULT_LIFETIME_MS,
    MigSlice,
    NodeRecord,
    RecordGpu,
    RecordModel,
    RecordPrice,
    Role,
    record_digest,
    record_key,
    sign_node_record,
)
from ngpu_protocol.observations import OBSERVATION_TYPE, Evidence, Observation, sign_observation
from ngpu_protocol.orders import ORDER_TYPE, SignedOrder, TaskOrder, sign_order
from ngpu_protocol.prices import PRICE_LIST_TYPE, Prices, sign_price_list
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.receipts import (
    FIRST_PREVIOUS,
    RECEIPT_TYPE,
    Meter,
    Outcome,
    SignedReceipt,
    TaskReceipt,
    sign_receipt,
)
from ngpu_protocol.sealing import seal
from ngpu_protocol.stand_ins import STAND_IN_TYPE, StandIn, sign_stand_in
from ngpu_protocol.statements import StatementFile, draw_up, line_of, prove, sign_statement
from ngpu_protocol.typed_data import ZERO32, SignedType, domain_separator
from ngpu_protocol.verification import Observed
from ngpu_protocol.workspace_secrets import RegistryCredentials, WorkspaceSecrets
from ngpu_protocol.workspaces import WorkspaceSpec

FOLDER = Path(__file__).parent
NETWORK = network_named("local")
NODE = Account.from_key(keccak(b"vector: node"))
BOOTSTRAP = Account.from_key(keccak(b"vector: bootstrap"))
GPUS = tuple(gpu_id(NODE.address, f"GPU-00000000-0000-4000-8000-00000000000{number}") for number in range(2))
AT_MS = 1_750_000_000_000

ORDER = TaskOrder(
    task_id="20250615_23_06_40_01234567890123456789",
    attempt=1,
    bootstrap=BOOTSTRAP.address,
    node=NODE.address,
    session=keccak(b"vector: session"),
    workspace="1001",
    revision=3,
    port=8080,
    method="POST",
    target="/sdapi/v1/txt2img?steps=20&name=caf%C3%A9",
    detach=False,
    issued_at_ms=AT_MS,
    deadline_ms=AT_MS + 300_000,
)
DETACHED = replace(ORDER, attempt=2, method="GET", target="/", port=65535, detach=True, deadline_ms=2**53 - 1)
ORDERS = {"synchronous": ORDER, "detached": DETACHED}

FIRST = TaskReceipt(
    order_hash=ORDER.digest(NETWORK.chain_id),
    node=NODE.address,
    bootstrap=BOOTSTRAP.address,
    sequence=1,
    previous=FIRST_PREVIOUS,
    image_digest=bytes.fromhex("11" * 32),
    request_hash=bytes.fromhex("22" * 32),
    request_bytes=27,
    status=200,
    response_hash=bytes.fromhex("33" * 32),
    response_bytes=5_000_000_000,
    outcome=Outcome.COMPLETE,
    started_at_ms=AT_MS + 3,
    ended_at_ms=AT_MS + 903,
    duration_ms=900,
    gpus=GPUS,
    reserved_gpu_ms=1800,
    busy_gpu_ms=1234,
    meter=Meter.NVML_PROCESS,
)
NO_ANSWER = replace(
    FIRST,
    order_hash=DETACHED.digest(NETWORK.chain_id),
    sequence=2,
    previous=FIRST.digest(NETWORK.chain_id),
    image_digest=bytes(32),
    status=0,
    response_bytes=0,
    outcome=Outcome.WORKSPACE_BROKE,
    gpus=(),
    reserved_gpu_ms=0,
    busy_gpu_ms=0,
    meter=Meter.NONE,
)
RECEIPTS = {"first of its chain": FIRST, "no answer, no GPU": NO_ANSWER}

VERIFIED = Acknowledgement(
    receipt_hash=FIRST.digest(NETWORK.chain_id),
    node=NODE.address,
    bootstrap=BOOTSTRAP.address,
    sequence=1,
    verdict=VerdictKind.VERIFIED,
    reason="",
    at_ms=AT_MS + 910,
)
DISPUTED = replace(
    VERIFIED,
    receipt_hash=NO_ANSWER.digest(NETWORK.chain_id),
    sequence=2,
    verdict=VerdictKind.DISPUTED,
    reason="response_hash",
)
ACKNOWLEDGEMENTS = {"verified": VERIFIED, "disputed": DISPUTED}

WORKSPACE = WorkspaceSpec.model_validate(
    {
        "id": "1001",
        "revision": 3,
        "name": "paint",
        "image": "registry:5000/paint@sha256:" + "11" * 32,
        "command": ["python", "-m", "paint"],
        "env": {"SEED": "1"},
        "secret_env": ["HF_TOKEN"],
        "volumes": [{"name": "models", "path": "/models"}],
        "end_at": AT_MS,
        "ports": [8080],
        "apis": [{"name": "createImage", "path": "/sdapi/v1/txt2img", "port": 8080}],
        "gpu_count": 2,
        "gpu_types": ["RTX4090"],
    }
)

NODE_RECORD = NodeRecord(
    network=NETWORK.name,
    node=NODE.address,
    peer_id=NODE.peer_id,
    sequence=7,
    issued_at_ms=AT_MS,
    expires_at_ms=AT_MS + DEFAULT_LIFETIME_MS,
    roles=(Role.NODE,),
    addresses=("/ip4/192.0.2.1/tcp/4911", "/ip6/2001:db8::1/tcp/4911"),
    gpus=(
        RecordGpu(
            id=GPUS[0],
            model="RTX4090",
            name="NVIDIA GeForce RTX 4090",
            memory_bytes=24 << 30,
            compute_capability="8.9",
            shares_free=3,
        ),
        RecordGpu(
            id=GPUS[1], model="A100-80G-MIG", memory_bytes=10 << 30, mig=MigSlice(profile="1g.10gb", parent=ZERO32)
        ),
    ),
    driver="580.65.06",
    cuda="13.0",
    slots=8,
    slots_free=5,
    cpus=32,
    memory_bytes=128 << 30,
    disk_free_bytes=1 << 40,
    workspaces=("1001",),
    models=(RecordModel(project="acme", model="llama", type="chat"),),
    region="eu-central",
    terms="https://example.com/terms",
    currency="USD",
    prices=(RecordPrice(model="RTX4090", per_second="0.00012"),),
    software="ngpu-node 1",
)
WITHDRAWN = NodeRecord(
    network=NETWORK.name,
    node=NODE.address,
    peer_id=NODE.peer_id,
    sequence=8,
    issued_at_ms=AT_MS,
    expires_at_ms=AT_MS + DEFAULT_LIFETIME_MS,
    withdrawn=True,
)
# as a later version might write it: fields unknown today, in the record and in a GPU
LATER = NodeRecord.model_validate(
    {**WITHDRAWN.model_dump(), "version": 2, "withdrawn": False, "sequence": 9, "power": {"source": "wind", "w": 450}}
)
NODE_RECORDS = {"everything": NODE_RECORD, "withdrawn": WITHDRAWN, "a later version's": LATER}
SECRETS = {
    "registry and environment": WorkspaceSecrets(
        registry=RegistryCredentials(username="acme", password="correct horse"), env={"API_KEY": "s3cret"}
    ),
    "environment": WorkspaceSecrets(env={"WORD": "caf\u00e9"}),
    "nothing": WorkspaceSecrets(),
}
PRICE_LIST = sign_price_list(
    Prices.of_models("USD", {"RTX 4090": "0.00012", "A100-80G": "0.0005"}), ORDER.session, NODE, NETWORK.chain_id
)
SEEN = Evidence(
    Observed(FIRST.request_hash, 27, 200, bytes.fromhex("44" * 32), 5_000_000_000, AT_MS, AT_MS + 905),
    previous=None,
    tolerance_ms=5000,
)
SAYS_OTHERWISE = replace(VERIFIED, verdict=VerdictKind.DISPUTED, reason="response_hash")
OBSERVATION = sign_observation(
    Observation(
        receipt_hash=FIRST.digest(NETWORK.chain_id),
        node=NODE.address,
        bootstrap=BOOTSTRAP.address,
        rule="response_hash",
        expected="0x" + "44" * 32,
        actual="0x" + "33" * 32,
        seen=SEEN.to_text(),
        at_ms=AT_MS + 910,
    ),
    BOOTSTRAP,
    NETWORK.chain_id,
)
LOSS = sign_loss(
    JobLoss(
        task_id=ORDER.task_id,
        order_hash=ORDER.digest(NETWORK.chain_id),
        node=NODE.address,
        bootstrap=BOOTSTRAP.address,
        job_id="f3e5b59c-7416-11ed-a160-00163e025c94",
        reason="job_node_gone",
        away_since_ms=AT_MS + 60_000,
        at_ms=AT_MS + 90_000,
    ),
    BOOTSTRAP,
    NETWORK.chain_id,
)
DISPUTE = Dispute(
    ReceiptFile(
        order=sign_order(ORDER, BOOTSTRAP, NETWORK.chain_id),
        receipt=sign_receipt(FIRST, NODE, NETWORK.chain_id),
        acknowledgement=sign_acknowledgement(SAYS_OTHERWISE, BOOTSTRAP, NETWORK.chain_id),
        chain_id=NETWORK.chain_id,
    ),
    OBSERVATION,
)
EQUIVOCATION = Contradiction(
    Kind.EQUIVOCATION,
    sign_receipt(FIRST, NODE, NETWORK.chain_id),
    sign_receipt(replace(FIRST, status=201), NODE, NETWORK.chain_id),
    NETWORK.chain_id,
)
SIBLING = Account.from_key(keccak(b"vector: sibling"))
STAND_IN = sign_stand_in(StandIn(BOOTSTRAP.address, SIBLING.address, AT_MS), BOOTSTRAP, NETWORK.chain_id)
BY_SIBLING = sign_acknowledgement(replace(VERIFIED, bootstrap=SIBLING.address), SIBLING, NETWORK.chain_id)
AFTER_A_GAP = sign_receipt(replace(FIRST, sequence=9, previous=keccak(b"vector: receipt 8")), NODE, NETWORK.chain_id)
GAP_CLAIM = sign_gap_claim(
    ClaimedGap(3, 8, AT_MS),
    AFTER_A_GAP.receipt.previous,
    node=NODE.address,
    account=BOOTSTRAP,
    chain_id=NETWORK.chain_id,
    now_ms=AT_MS + 3_600_000,
)
WITHHELD = Withheld(AFTER_A_GAP, GAP_CLAIM, NETWORK.chain_id)
BINDING = NodeBinding(NODE.address, Account.from_key(keccak(b"vector: wallet")).address, "Acme GPU Works", AT_MS)
CAPABILITIES = ("gpu:RTX4090", "workspace:1001", "model:acme/llama", "region:eu-central", "role:bootstrap")


def _hex(data: bytes) -> str:
    return "0x" + data.hex()


def _identity() -> list[dict[str, str]]:
    accounts = [Account.from_key(bytes(31) + b"\x01"), NODE, BOOTSTRAP]
    return [
        {
            "privateKey": _hex(account.key_bytes),
            "publicKey": _hex(account.public_key),
            "address": account.address,
            "peerId": account.peer_id,
            "gpuUuid": "GPU-0",
            "gpuId": _hex(gpu_id(account.address, "GPU-0")),
        }
        for account in accounts
    ]


def _networks() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "chainId": network_named(name).chain_id,
            "kadProtocol": network_named(name).kad_protocol,
            "domainSeparator": _hex(domain_separator(network_named(name).chain_id)),
        }
        for name in ("main", "test", "local", "acme-lab")
    ]


def _signed_order(order: TaskOrder) -> SignedOrder:
    return sign_order(order, BOOTSTRAP, NETWORK.chain_id)


def _signed_receipt(receipt: TaskReceipt) -> SignedReceipt:
    return sign_receipt(receipt, NODE, NETWORK.chain_id)


def _signed_acknowledgement(acknowledgement: Acknowledgement) -> SignedAcknowledgement:
    return sign_acknowledgement(acknowledgement, BOOTSTRAP, NETWORK.chain_id)


def _records(signed_type: SignedType[Any], records: dict[str, Any], sign: Any, account: Account) -> dict[str, Any]:
    vectors = []
    for name, record in records.items():
        signed = sign(record)
        vectors.append(
            {
                "name": name,
                "record": signed_type.to_json(record, signed.signature),
                "structHash": _hex(record.struct_hash()),
                "digest": _hex(record.digest(NETWORK.chain_id)),
                "text": signed.encode(),
            }
        )
    return {
        "type": signed_type.text,
        "typeHash": _hex(keccak(signed_type.text.encode())),
        "chainId": NETWORK.chain_id,
        "signer": account.address,
        "privateKey": _hex(account.key_bytes),
        "vectors": vectors,
    }


def _signed_texts(signed_type: SignedType[Any], signature: bytes, record: Any, account: Account) -> dict[str, Any]:
    return {
        "type": signed_type.text,
        "typeHash": _hex(keccak(signed_type.text.encode())),
        "chainId": NETWORK.chain_id,
        "signer": account.address,
        "privateKey": _hex(account.key_bytes),
        "vectors": [
            {
                "record": signed_type.to_json(record, signature),
                "structHash": _hex(signed_type.struct_hash(record)),
                "digest": _hex(record.digest(NETWORK.chain_id)),
                "msgpack": _hex(signed_type.pack(record, signature)),
            }
        ],
    }


def _messages() -> list[dict[str, str]]:
    messages = [
        Hello(
            "local",
            1,
            1,
            ORDER.session,
            NODE.address,
            "ngpu-node 1",
            AT_MS,
            (GpuOffer(GPUS[0], "RTX4090", 2**34),),
            8,
            PRICE_LIST.wire,
        ),
        Welcome("local", 1, "acme", AT_MS, 2, NO_ANSWER.digest(NETWORK.chain_id), 2.0, True),
        Refused("wrong_network", "this bootstrap serves test"),
        Heartbeat(
            AT_MS,
            3,
            False,
            (DeploymentState("1001", 3, DeploymentPhase.READY, "", 3, bytes.fromhex("11" * 32), GPUS, yours=1),),
            (ServiceOffer("acme", "llama", "chat", 1),),
            host=HostOffer(True, 7.5, 2**34, 2**36, 2**33, ("docker.io",), True, False, True, "eu"),
            yours=2,
        ),
        Desired((WORKSPACE,), {"1001": bytes.fromhex("5ea1ed")}, AT_MS),
        Bye("draining"),
        Offer(_signed_order(ORDER).wire, _signed_receipt(FIRST).wire),
        Ack(_signed_acknowledgement(VERIFIED).wire),
        Ack(_signed_acknowledgement(SAYS_OTHERWISE).wire, OBSERVATION.wire),
        Ack(BY_SIBLING.wire, stand_in=STAND_IN.wire),
        Gap(1, 1),
        Gap(3, 8, GAP_CLAIM.wire),
        Head(2, NO_ANSWER.digest(NETWORK.chain_id)),
    ]
    return [{"type": type(message).__name__, "msgpack": _hex(encode_message(message))} for message in messages]


def _node_records() -> dict[str, Any]:
    return {
        "chainId": NETWORK.chain_id,
        "signer": NODE.address,
        "key": record_key(NODE.address).decode(),
        "vectors": [
            {
                "name": name,
                "sequence": record.sequence,
                "payload": _hex(record.encode()),
                "digest": _hex(record_digest(record.encode(), NETWORK.chain_id)),
                "value": _hex(sign_node_record(record, NODE, NETWORK).encode()),
            }
            for name, record in NODE_RECORDS.items()
        ],
    }


def _capabilities() -> list[dict[str, Any]]:
    return [
        {
            "capability": text,
            "network": NETWORK.name,
            "epoch": epoch_at(AT_MS),
            "shard": shard,
            "key": _hex(capability_key(Capability.parse(text), NETWORK, epoch_at(AT_MS), shard)),
        }
        for text in CAPABILITIES
        for shard in ("", shard_of(NODE.address))
    ]


def _sealed() -> list[dict[str, Any]]:
    vectors = []
    for name, secrets in SECRETS.items():
        ephemeral = keccak(f"vector: sealed {name}".encode())
        plaintext = secrets.encode()
        box = seal(plaintext, NODE.public_key, workspace="1001", revision=3, ephemeral_key=ephemeral)
        vectors.append(
            {
                "name": name,
                "privateKey": _hex(NODE.key_bytes),
                "recipient": NODE.peer_id,
                "workspace": "1001",
                "revision": 3,
                "ephemeralKey": _hex(ephemeral),
                "plaintext": plaintext.decode(),
                "sealed": _hex(box),
            }
        )
    return vectors


def _statement() -> tuple[StatementFile, list[bytes]]:
    acknowledged = (
        (FIRST, VERIFIED.verdict),
        *((receipt, VerdictKind.DISPUTED) for receipt in list(RECEIPTS.values())[1:]),
    )
    lines = sorted(
        (line_of(receipt, verdict, NETWORK.chain_id) for receipt, verdict in acknowledged),
        key=lambda line: line.sequence,
    )
    statement, leaves = draw_up(
        lines,
        node=NODE.address,
        bootstrap=BOOTSTRAP.address,
        from_ms=AT_MS,
        to_ms=AT_MS + 86_400_000,
        at_ms=AT_MS + 86_400_000,
    )
    signature = sign_statement(statement, BOOTSTRAP, NETWORK.chain_id)
    return StatementFile(statement, signature, NETWORK.chain_id, lines=tuple(lines)), leaves


def _bill() -> BillPart:
    """Return what the receipts of the statement cost: the first was for the session with prices."""
    statement, lines = _statement()[0].statement, _statement()[0].lines or ()
    bases = (
        Basis(PRICE_LIST.price_list.session, tuple((gpu, "RTX4090") for gpu in FIRST.gpus)),
        Basis(NO_SESSION, ()),
    )
    numbers = tuple(0 if line.receipt_hash == FIRST.digest(NETWORK.chain_id) else 1 for line in lines)
    billed = [(line.billed_gpu_ms, number) for line, number in zip(lines, numbers, strict=True)]
    amounts = amounts_of(billed, bases, {PRICE_LIST.price_list.session: PRICE_LIST.prices()})
    leaves = leaves_of(((line.receipt_hash, number) for line, number in zip(lines, numbers, strict=True)), bases)
    bill = Bill(
        statement_hash=statement.digest(NETWORK.chain_id),
        node=statement.node,
        bootstrap=statement.bootstrap,
        amounts=amounts_text(amounts),
        root=tree_root(leaves),
    )
    return BillPart(bill, sign_bill(bill, BOOTSTRAP, NETWORK.chain_id), (PRICE_LIST,), bases, numbers)


BILL = _bill()


def _bills() -> dict[str, Any]:
    """Return a bill, and the statement's file it is in."""
    part = BILL
    bases = zip(part.to_document()["bases"], part.bases, strict=True)
    return {
        **_signed_texts(BILL_TYPE, part.signature, part.bill, BOOTSTRAP),
        "bases": [{"basis": document, "digest": _hex(basis.digest())} for document, basis in bases],
        "file": replace(_statement()[0], bill=part).to_document(),
    }


def _statements() -> dict[str, Any]:
    """Return a statement with its lines, and the proof for each."""
    file, leaves = _statement()
    statement, lines = file.statement, file.lines or ()
    return {
        "digest": _hex(statement.digest(NETWORK.chain_id)),
        "leaves": [{"data": _hex(line.encode()), "hash": _hex(leaf)} for line, leaf in zip(lines, leaves, strict=True)],
        "file": file.to_document(),
        "proofs": [
            prove(file, leaves, line, index, None).to_document()["inclusion"] for index, line in enumerate(lines)
        ],
    }


def documents() -> dict[str, Any]:
    """Return the vectors by file name."""
    file = ReceiptFile(
        order=_signed_order(ORDER),
        receipt=_signed_receipt(FIRST),
        acknowledgement=_signed_acknowledgement(VERIFIED),
        chain_id=NETWORK.chain_id,
    )
    return {
        "identity.json": _identity(),
        "networks.json": _networks(),
        "orders.json": _records(ORDER_TYPE, ORDERS, _signed_order, BOOTSTRAP),
        "receipts.json": _records(RECEIPT_TYPE, RECEIPTS, _signed_receipt, NODE),
        "acknowledgements.json": _records(ACKNOWLEDGEMENT_TYPE, ACKNOWLEDGEMENTS, _signed_acknowledgement, BOOTSTRAP),
        "messages.json": _messages(),
        "node-records.json": _node_records(),
        "capabilities.json": _capabilities(),
        "sealed.json": _sealed(),
        "receipt-file.json": file.to_document(),
        "statements.json": _statements(),
        "bills.json": _bills(),
        "price-lists.json": _signed_texts(PRICE_LIST_TYPE, PRICE_LIST.signature, PRICE_LIST.price_list, NODE),
        "observations.json": _signed_texts(OBSERVATION_TYPE, OBSERVATION.signature, OBSERVATION.observation, BOOTSTRAP),
        "stand-ins.json": _signed_texts(STAND_IN_TYPE, STAND_IN.signature, STAND_IN.stand_in, BOOTSTRAP),
        "losses.json": _signed_texts(LOSS_TYPE, LOSS.signature, LOSS.loss, BOOTSTRAP),
        "loss-file.json": LossFile(LOSS, file.order, file.receipt, NETWORK.chain_id).to_document(),
        "node-bindings.json": _signed_texts(
            NODE_BINDING_TYPE, sign_node_binding(BINDING, NODE, NETWORK.chain_id), BINDING, NODE
        ),
        "dispute-files.json": {
            "dispute": to_document(DISPUTE),
            "equivocation": to_document(EQUIVOCATION),
            "withheld": to_document(WITHHELD),
        },
        "receipt-file-by-sibling.json": replace(file, acknowledgement=BY_SIBLING, stand_in=STAND_IN).to_document(),
    }


def main() -> None:
    for name, document in documents().items():
        (FOLDER / name).write_text(json.dumps(document, indent=2) + "\n")
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
