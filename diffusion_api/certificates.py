"""A certificate that its owner signs, for https where nobody else vouches for the box."""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from diffusion_api import disk
from diffusion_api.errors import Misconfigured

DAYS = 825
"""What browsers bear at most."""


def self_signed(folder: Path, names: tuple[str, ...]) -> tuple[Path, Path]:
    """Write ``key.pem`` (mode 600) and ``cert.pem`` for these host names and addresses. Raises Misconfigured.

    Nothing that is there already is replaced.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(key, names)
    pem = serialization.Encoding.PEM
    kept = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths = folder / "key.pem", folder / "cert.pem"
    try:
        disk.make_folder(folder)
        for path, data in zip(paths, (kept, certificate.public_bytes(pem)), strict=True):
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
    except OSError as error:
        raise Misconfigured(f"{path} cannot be written: {error.strerror}") from error
    return paths


def _certificate(key: ec.EllipticCurvePrivateKey, names: tuple[str, ...]) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
        .add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )  # so that curl takes it as its own root
        .sign(key, hashes.SHA256())
    )


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
