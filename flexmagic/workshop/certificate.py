"""A certificate made on the spot for a gateway that others reach over a network, known by its fingerprint."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flexmagic.errors import ClusterError

DAYS = 30
"""How long a certificate is good for; a workshop is shorter."""


@dataclass(frozen=True)
class Certificate:
    """A certificate and its private key, both as PEM."""

    certificate: str
    key: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hex."""
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.certificate)).hexdigest()

    def context(self, folder: Path) -> ssl.SSLContext:
        """A server's TLS context; ``folder``: which only its owner can read, for as long as this takes."""
        paths = folder / "certificate.pem", folder / "key.pem"
        for path, text in zip(paths, (self.certificate, self.key), strict=True):
            path.touch(0o600)
            path.write_text(text, encoding="ascii")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*paths)
        for path in paths:
            path.unlink()
        return context


def make(folder: Path) -> Certificate:
    """A new self-signed certificate, made by the ``openssl`` command in a folder of its owner alone.

    Raises :class:`ClusterError` without that command.
    """
    key, certificate = folder / "new-key.pem", folder / "new-certificate.pem"
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
    return Certificate(certificate.read_text(encoding="ascii"), key.read_text(encoding="ascii"))
