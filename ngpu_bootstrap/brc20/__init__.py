"""BRC-20 assets of Bitcoin addresses: what an address is, what it holds, and what a workspace asks of its callers.

`addresses` and `policies` are pure; `indexers` speaks to the services that know balances, `checker` asks them with a
cache and bounds, `desk` applies a workspace's policy to a call.
"""
