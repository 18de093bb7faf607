// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

/// Checks on a chain what NGPU peers sign: every record of docs/protocol.md, and that a receipt is in a statement.
///
/// The wire is docs/protocol.md, sections 4 and 10. Pure arithmetic over calldata: it stores nothing, pays nobody, and
/// exists to show that a contract needs only a signed root and a proof.
contract NgpuVerifier {
    struct TaskReceipt {
        bytes32 orderHash;
        address node;
        address bootstrap;
        uint64 sequence;
        bytes32 previous;
        bytes32 imageDigest;
        bytes32 requestHash;
        uint64 requestBytes;
        uint16 status;
        bytes32 responseHash;
        uint64 responseBytes;
        string outcome;
        uint64 startedAtMs;
        uint64 endedAtMs;
        uint64 durationMs;
        bytes32[] gpus;
        uint64 reservedGpuMs;
        uint64 busyGpuMs;
        string meter;
    }

    struct Statement {
        address node;
        address bootstrap;
        uint64 fromMs;
        uint64 toMs;
        uint64 receipts;
        uint64 paidReceipts;
        uint64 reservedGpuMs;
        uint64 busyGpuMs;
        uint64 billedGpuMs;
        bytes32 root;
        uint64 atMs;
    }

    struct TaskOrder {
        string taskId;
        uint32 attempt;
        address bootstrap;
        address node;
        bytes32 session;
        string workspace;
        uint32 revision;
        uint16 port;
        string method;
        string target;
        bool detach;
        uint64 issuedAtMs;
        uint64 deadlineMs;
    }

    struct Acknowledgement {
        bytes32 receiptHash;
        address node;
        address bootstrap;
        uint64 sequence;
        string verdict;
        string reason;
        uint64 atMs;
    }

    struct StandIn {
        address bootstrap;
        address sibling;
        uint64 atMs;
    }

    struct PriceList {
        address node;
        bytes32 session;
        string currency;
        string perSecond;
    }

    struct Observation {
        bytes32 receiptHash;
        address node;
        address bootstrap;
        string rule;
        string expected;
        string actual;
        string seen;
        uint64 atMs;
    }

    struct NodeBinding {
        address node;
        address wallet;
        string orgName;
        uint64 sequence;
    }

    struct Bill {
        bytes32 statementHash;
        address node;
        address bootstrap;
        string amounts;
        bytes32 root;
    }

    struct JobLoss {
        string taskId;
        bytes32 orderHash;
        address node;
        address bootstrap;
        string jobId;
        string reason;
        uint64 awaySinceMs;
        uint64 atMs;
    }

    bytes32 private constant BILL_TYPE =
        keccak256("Bill(bytes32 statementHash,address node,address bootstrap,string amounts,bytes32 root)");
    bytes32 private constant JOB_LOSS_TYPE = keccak256(
        "JobLoss(string taskId,bytes32 orderHash,address node,address bootstrap,string jobId,string reason,uint64 awaySinceMs,uint64 atMs)"
    );
    bytes32 private constant ORDER_TYPE = keccak256(
        "TaskOrder(string taskId,uint32 attempt,address bootstrap,address node,bytes32 session,string workspace,uint32 revision,uint16 port,string method,string target,bool detach,uint64 issuedAtMs,uint64 deadlineMs)"
    );
    bytes32 private constant ACKNOWLEDGEMENT_TYPE = keccak256(
        "Acknowledgement(bytes32 receiptHash,address node,address bootstrap,uint64 sequence,string verdict,string reason,uint64 atMs)"
    );
    bytes32 private constant STAND_IN_TYPE = keccak256("StandIn(address bootstrap,address sibling,uint64 atMs)");
    bytes32 private constant PRICE_LIST_TYPE =
        keccak256("PriceList(address node,bytes32 session,string currency,string perSecond)");
    bytes32 private constant OBSERVATION_TYPE = keccak256(
        "Observation(bytes32 receiptHash,address node,address bootstrap,string rule,string expected,string actual,string seen,uint64 atMs)"
    );
    bytes32 private constant NODE_BINDING_TYPE =
        keccak256("NodeBinding(address node,address wallet,string orgName,uint64 sequence)");
    bytes32 private constant RECEIPT_TYPE = keccak256(
        "TaskReceipt(bytes32 orderHash,address node,address bootstrap,uint64 sequence,bytes32 previous,bytes32 imageDigest,bytes32 requestHash,uint64 requestBytes,uint16 status,bytes32 responseHash,uint64 responseBytes,string outcome,uint64 startedAtMs,uint64 endedAtMs,uint64 durationMs,bytes32[] gpus,uint64 reservedGpuMs,uint64 busyGpuMs,string meter)"
    );
    bytes32 private constant STATEMENT_TYPE = keccak256(
        "Statement(address node,address bootstrap,uint64 fromMs,uint64 toMs,uint64 receipts,uint64 paidReceipts,uint64 reservedGpuMs,uint64 busyGpuMs,uint64 billedGpuMs,bytes32 root,uint64 atMs)"
    );
    /// Half the order of secp256k1: a signature with a higher s is the twin of a valid one, and refused.
    uint256 private constant HIGHEST_S = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0;
    uint256 private constant LINE_BYTES = 65;

    bytes32 private immutable domain;

    /// @param networkChainId the chainId of the NGPU network, which is not that of the chain this runs on
    constructor(uint256 networkChainId) {
        domain = keccak256(
            abi.encode(
                keccak256("EIP712Domain(string name,string version,uint256 chainId)"),
                keccak256("NGPU"),
                keccak256("1"),
                networkChainId
            )
        );
    }

    function receiptHash(TaskReceipt calldata r) public view returns (bytes32) {
        // in two halves: one call with twenty arguments is more than the stack holds
        bytes memory head = abi.encode(
            RECEIPT_TYPE, r.orderHash, r.node, r.bootstrap, r.sequence, r.previous, r.imageDigest, r.requestHash,
            r.requestBytes, r.status
        );
        bytes memory tail = abi.encode(
            r.responseHash, r.responseBytes, keccak256(bytes(r.outcome)), r.startedAtMs, r.endedAtMs, r.durationMs,
            keccak256(abi.encodePacked(r.gpus)), r.reservedGpuMs, r.busyGpuMs, keccak256(bytes(r.meter))
        );
        return typed(keccak256(bytes.concat(head, tail)));
    }

    function orderHash(TaskOrder calldata o) public view returns (bytes32) {
        bytes memory head = abi.encode(
            ORDER_TYPE, keccak256(bytes(o.taskId)), o.attempt, o.bootstrap, o.node, o.session,
            keccak256(bytes(o.workspace)), o.revision
        );
        bytes memory tail = abi.encode(
            o.port, keccak256(bytes(o.method)), keccak256(bytes(o.target)), o.detach, o.issuedAtMs, o.deadlineMs
        );
        return typed(keccak256(bytes.concat(head, tail)));
    }

    function acknowledgementHash(Acknowledgement calldata a) public view returns (bytes32) {
        return typed(
            keccak256(
                abi.encode(
                    ACKNOWLEDGEMENT_TYPE, a.receiptHash, a.node, a.bootstrap, a.sequence, keccak256(bytes(a.verdict)),
                    keccak256(bytes(a.reason)), a.atMs
                )
            )
        );
    }

    function standInHash(StandIn calldata s) public view returns (bytes32) {
        return typed(keccak256(abi.encode(STAND_IN_TYPE, s)));
    }

    function priceListHash(PriceList calldata p) public view returns (bytes32) {
        return typed(
            keccak256(
                abi.encode(PRICE_LIST_TYPE, p.node, p.session, keccak256(bytes(p.currency)), keccak256(bytes(p.perSecond)))
            )
        );
    }

    function observationHash(Observation calldata o) public view returns (bytes32) {
        bytes memory head = abi.encode(OBSERVATION_TYPE, o.receiptHash, o.node, o.bootstrap, keccak256(bytes(o.rule)));
        bytes memory tail =
            abi.encode(keccak256(bytes(o.expected)), keccak256(bytes(o.actual)), keccak256(bytes(o.seen)), o.atMs);
        return typed(keccak256(bytes.concat(head, tail)));
    }

    function nodeBindingHash(NodeBinding calldata b) public view returns (bytes32) {
        return typed(
            keccak256(abi.encode(NODE_BINDING_TYPE, b.node, b.wallet, keccak256(bytes(b.orgName)), b.sequence))
        );
    }

    function jobLossHash(JobLoss calldata l) public view returns (bytes32) {
        bytes memory head =
            abi.encode(JOB_LOSS_TYPE, keccak256(bytes(l.taskId)), l.orderHash, l.node, l.bootstrap);
        bytes memory tail =
            abi.encode(keccak256(bytes(l.jobId)), keccak256(bytes(l.reason)), l.awaySinceMs, l.atMs);
        return typed(keccak256(bytes.concat(head, tail)));
    }

    function billHash(Bill calldata b) public view returns (bytes32) {
        return typed(
            keccak256(
                abi.encode(BILL_TYPE, b.statementHash, b.node, b.bootstrap, keccak256(bytes(b.amounts)), b.root)
            )
        );
    }

    function statementHash(Statement calldata s) public view returns (bytes32) {
        return typed(keccak256(abi.encode(STATEMENT_TYPE, s)));
    }

    /// The address whose key made the signature, or zero.
    function signer(bytes32 digest, bytes calldata signature) public pure returns (address) {
        if (signature.length != 65) return address(0);
        bytes32 r = bytes32(signature[0:32]);
        bytes32 s = bytes32(signature[32:64]);
        if (uint256(s) > HIGHEST_S) return address(0);
        return ecrecover(digest, uint8(signature[64]), r, s);
    }

    /// Whether the line at this place of a tree of that size leads to the root (RFC 9162, 2.1.3.2).
    function includes(bytes32 root, uint64 size, uint64 index, bytes calldata line, bytes32[] calldata path)
        public
        pure
        returns (bool)
    {
        if (index >= size || line.length != LINE_BYTES) return false;
        uint64 place = index;
        uint64 last = size - 1;
        bytes32 hash = sha256(bytes.concat(hex"00", line));
        for (uint256 i = 0; i < path.length; i++) {
            if (last == 0) return false;
            if (place & 1 == 1 || place == last) {
                hash = sha256(bytes.concat(hex"01", path[i], hash));
                while (place & 1 == 0 && place != 0) {
                    place >>= 1;
                    last >>= 1;
                }
            } else {
                hash = sha256(bytes.concat(hex"01", hash, path[i]));
            }
            place >>= 1;
            last >>= 1;
        }
        return last == 0 && hash == root;
    }

    /// The billed milliseconds of one receipt, if its node signed it, its bootstrap signed a statement of that node, and
    /// the statement holds its line; else it reverts with what is wrong.
    function provenBilledMs(
        Statement calldata statement,
        bytes calldata statementSignature,
        uint64 index,
        bytes calldata line,
        bytes32[] calldata path,
        TaskReceipt calldata receipt,
        bytes calldata receiptSignature
    ) external view returns (uint64) {
        require(signer(statementHash(statement), statementSignature) == statement.bootstrap, "statement signer");
        require(receipt.node == statement.node && receipt.bootstrap == statement.bootstrap, "another account");
        bytes32 digest = receiptHash(receipt);
        require(signer(digest, receiptSignature) == receipt.node, "receipt signer");
        require(includes(statement.root, statement.receipts, index, line, path), "not included");
        require(bytes32(line[0:32]) == digest, "another receipt");
        return uint64(bytes8(line[57:65]));
    }

    /// Whether a receipt was acknowledged with this verdict by the bootstrap that ordered it, or by a sibling that has
    /// its word (the stand-in's signature is empty where none is needed); else it reverts with what is wrong.
    function acknowledged(
        TaskReceipt calldata receipt,
        bytes calldata receiptSignature,
        Acknowledgement calldata ack,
        bytes calldata ackSignature,
        StandIn calldata standIn,
        bytes calldata standInSignature
    ) external view returns (string memory) {
        bytes32 digest = receiptHash(receipt);
        require(signer(digest, receiptSignature) == receipt.node, "receipt signer");
        require(ack.receiptHash == digest && ack.node == receipt.node && ack.sequence == receipt.sequence, "another receipt");
        require(signer(acknowledgementHash(ack), ackSignature) == ack.bootstrap, "acknowledgement signer");
        if (ack.bootstrap != receipt.bootstrap) {
            require(standIn.bootstrap == receipt.bootstrap && standIn.sibling == ack.bootstrap, "no stand-in");
            require(signer(standInHash(standIn), standInSignature) == receipt.bootstrap, "stand-in signer");
        }
        return ack.verdict;
    }

    /// Whether the list is the one a receipt is priced by: its node signed it for the session that the receipt's order
    /// names. A list of a later session, made when the work was done, reverts.
    function pricedBy(
        TaskReceipt calldata receipt,
        TaskOrder calldata order,
        bytes calldata orderSignature,
        PriceList calldata list,
        bytes calldata listSignature
    ) external view returns (string memory) {
        bytes32 digest = orderHash(order);
        require(signer(digest, orderSignature) == receipt.bootstrap, "order signer");
        require(receipt.orderHash == digest, "another order");
        require(list.node == receipt.node && signer(priceListHash(list), listSignature) == list.node, "list signer");
        require(list.session == order.session, "list of another session");
        return list.perSecond;
    }

    function typed(bytes32 structHash) private view returns (bytes32) {
        return keccak256(bytes.concat(hex"1901", domain, structHash));
    }
}
