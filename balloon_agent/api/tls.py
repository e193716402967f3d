"""How metrics are served by TLS: certificates, keys and authorities in files."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from balloon_agent.errors import BadInput
from balloon_agent.options import Options


@dataclass(frozen=True)
class Security:
    """TLS: the certificate, its key (None: in the same file), and the authority that clients' certificates must be of."""

    certificate: Path
    key: Path | None = None
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """What is in the files now. BadInput for one that cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Sessions of earlier versions would be kept for their clients, up to 20480 (SSL_CTX_sess_set_cache_size(3)).
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise BadInput(
                f"metrics cannot be served by TLS with {self.certificate} and {self.key or 'the key in it'}: "
                f"{error.strerror or error}; both are PEM files, the key without a passphrase"
            ) from error
        if self.client_ca is None:
            return context
        try:
            context.load_verify_locations(self.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise BadInput(
                f"{self.client_ca} is no authority for clients: {error.strerror or error}; it is a PEM file"
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def security(options: Options) -> Security | None:
    """What the options say of it."""
    if options.metrics_certificate is None:
        return None
    return Security(options.metrics_certificate, options.metrics_key, options.metrics_client_ca)
