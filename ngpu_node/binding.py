"""Who is paid for this node's work, in its own signed words: for `POST /user/nodeRegister` of a bootstrap."""

from __future__ import annotations

import time
from typing import Any

from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.keystore import open_keystore, read_passphrase
from ngpu_node.config import NodeSettings
from ngpu_node.errors import NodeConfigurationError
from ngpu_protocol.errors import AddressError
from ngpu_protocol.identity import parse_address
from ngpu_protocol.networks import network_named
from ngpu_protocol.node_bindings import MAX_ORG_NAME_CHARS, NodeBinding, sign_node_binding


def signed_binding(settings: NodeSettings, wallet: str, org_name: str) -> dict[str, Any]:
    """Return the body that binds the node of *settings* to *wallet*; a later one replaces it.

    Raises:
        OperatorError: the keystore cannot be opened, or the wallet is no address.
    """
    try:
        paid = parse_address(wallet)
    except AddressError as error:
        raise NodeConfigurationError(f"--wallet: {error}") from None
    if len(org_name) > MAX_ORG_NAME_CHARS:
        raise NodeConfigurationError(f"--org has {len(org_name)} characters, at most {MAX_ORG_NAME_CHARS} are taken")
    account = open_keystore(DataDirectory(settings.data_dir).keystore, read_passphrase(settings.passphrase_file))
    binding = NodeBinding(account.address, paid, org_name, time.time_ns() // 1_000_000)
    signature = sign_node_binding(binding, account, network_named(settings.network).chain_id)
    return {
        "nodeAddr": binding.node,
        "walletAccount": binding.wallet,
        "orgName": binding.org_name,
        "sequence": binding.sequence,
        "signature": "0x" + signature.hex(),
    }
