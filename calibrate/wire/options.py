"""Where a server listens, and who may ask it; no model, no torch."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from calibrate.run.errors import UsageError


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, and what it grants.

    Attributes
    ----------
    host, port : str, int
        Port 0 takes a free one.
    tls_cert, tls_key, token_file : Path or None
        PEM files, and a file that holds the bearer token; all needed off loopback.
    max_sessions : int
    max_batch : int
        Sessions advanced together.
    max_context : int
        Tokens of one session.
    max_message_bytes : int
    idle_s : float
        After which a session without a connection, or a silent one, is freed.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    max_sessions: int = 64
    max_batch: int = 32
    max_context: int = 8192
    max_message_bytes: int = 4 * 2**20
    idle_s: float = 300.0

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("--tls-cert and --tls-key: give both or none")
        secured = self.tls_cert is not None and self.token_file is not None
        if not secured and not is_loopback(self.host):
            raise UsageError(
                f"--host {self.host}: off loopback a server needs --tls-cert, --tls-key and "
                "--token-file"
            )

    def check_secrets(self) -> None:
        """Read certificate, key and token, so that what is wrong with them is told at once.

        Raises
        ------
        UsageError
        """
        self.token()
        self.tls()

    def token(self) -> str | None:
        """The bearer token."""
        return None if self.token_file is None else read_token(self.token_file)

    def tls(self) -> ssl.SSLContext | None:
        """The context of a TLS server."""
        if self.tls_cert is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(
                f"--tls-cert {self.tls_cert}: {error.strerror or error}; give a certificate and "
                "its key as PEM files"
            ) from None
        return context


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(path: Path) -> str:
    """A bearer token of 16 characters or more from a file.

    Raises
    ------
    UsageError
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        raise UsageError(f"--token-file {path}: cannot be read") from None
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"--token-file {path}: allowed is one word of 16 or more printable ASCII characters"
        )
    return token
