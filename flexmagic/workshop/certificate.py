"""A certificate made on the spot for a gateway that others reach over a network, known by its fingerprint."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
from pathlib import Path

from flexmagic.errors import ClusterError

DAYS = 30
"""How long a certificate is good for; a workshop is shorter."""


def make(folder: Path) -> tuple[ssl.SSLContext, str]:
    """A server's TLS context with a new self-signed certificate, and its SHA-256 fingerprint in hex.

    Made by the ``openssl`` command. Raises :class:`ClusterError` without it.
    """
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-days", str(DAYS), "-subj", "/CN=flexmagic", "-keyout", str(key), "-out", str(certificate),
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)  # noqa: S603 - our own words
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(
            "A workshop beyond this machine needs TLS, and no certificate could be made with the "
            f"`openssl` command: {error}. Install openssl, or leave --host out."
        ) from None
    key.chmod(0o600)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    der = ssl.PEM_cert_to_DER_cert(certificate.read_text(encoding="ascii"))
    return context, hashlib.sha256(der).hexdigest()
