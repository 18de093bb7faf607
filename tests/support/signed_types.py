"""Every type of record that peers sign, found in the protocol itself: none can be forgotten by a list of them."""

from __future__ import annotations

import importlib
import pkgutil

import ngpu_protocol
from ngpu_protocol.typed_data import SignedType


def signed_types() -> set[str]:
    """Return the EIP-712 type texts of all signed records."""
    modules = [module.name for module in pkgutil.iter_modules(ngpu_protocol.__path__, "ngpu_protocol.")]
    return {
        value.text
        for name in modules
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, SignedType)
    }
