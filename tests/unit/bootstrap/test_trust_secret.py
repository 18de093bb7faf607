"""The secret by which checks are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngpu_bootstrap.trust_secret import FILE, TrustSecretError, trust_secret


def test_it_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    secret = trust_secret(tmp_path)
    assert len(secret) == 32
    assert trust_secret(tmp_path) == secret
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_one_that_is_none_is_an_error_with_words(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"short")
    with pytest.raises(TrustSecretError, match="remove it"):
        trust_secret(tmp_path)
