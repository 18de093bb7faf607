"""Loads the libraries the protocol is checked against, and undoes what they do to the interpreter."""

import sys

_limit = sys.getrecursionlimit()

import eth_account  # noqa: E402, F401

# It imports py_ecc, which raises the limit to 100,000: deep nesting in hostile input then ends the process by SIGSEGV
# instead of a RecursionError. Our programs undo it too (ngpu_daemon.keystore).
sys.setrecursionlimit(_limit)
