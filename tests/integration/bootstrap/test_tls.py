"""The clients' listener with TLS, and what refuses to start without a usable certificate."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import httpx
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ngpu_bootstrap.daemon import StartError, run_daemon
from tests.integration.bootstrap.rig import settings_for


def certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


async def to_its_end(stream: trio.SocketStream) -> None:
    while await stream.receive_some(1000):
        pass


def test_clients_are_served_over_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)

    async def main() -> None:
        tls = {"certificate": cert, "key": key}
        settings = settings_for(tmp_path / "bootstrap", http_listen="127.0.0.1:0", tls=tls)
        async with trio.open_nursery() as nursery:
            where = await nursery.start(run_daemon, settings)
            assert where["http"][0].startswith("https://127.0.0.1:")
            port = int(where["http"][0].rpartition(":")[2])
            context = ssl.create_default_context(cafile=str(cert))
            async with httpx.AsyncClient(verify=context) as client:
                answer = await client.get(f"https://localhost:{port}/health")
                assert (answer.status_code, answer.content) == (200, b'{"status":"ok"}')
            async with await trio.open_tcp_stream("127.0.0.1", port) as plain:
                await plain.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                with pytest.raises(trio.BrokenResourceError):
                    await to_its_end(plain)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_certificate_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    cert, _ = certificate(tmp_path)
    settings = settings_for(tmp_path / "bootstrap", tls={"certificate": cert, "key": cert})
    with pytest.raises(StartError, match="cannot be used"):
        trio.run(run_daemon, settings)


def test_an_address_that_cannot_be_listened_on_is_one_clear_error(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "bootstrap", listen=("/dns4/nowhere",))
    with pytest.raises(ExceptionGroup) as failed:
        trio.run(run_daemon, settings)
    assert failed.group_contains(StartError, match="/dns4/nowhere")
