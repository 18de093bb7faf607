"""Containers: which engine there is, how a workspace becomes a container, and how it is kept alive."""
