"""Certificates for tests: an authority of one's own, and what it signs."""

import datetime as dt
import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = dt.timedelta(days=1)
SIGNING = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path

    def server_context(self, clients_of: "Authority | None" = None) -> ssl.SSLContext:
        """What a server shows it with; with an authority, clients must show one of its certificates, too."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        if clients_of is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(clients_of.file)
        return context


class Authority:
    """Signs certificates; its own lies in `file`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name, self._issued = folder, _named(name), 0
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.file = folder / f"{name}.pem"
        draft = _draft(self._name, self._key.public_key(), self._name, DAY)
        draft = draft.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        own = draft.add_extension(SIGNING, critical=True).sign(self._key, hashes.SHA256())
        self.file.write_bytes(own.public_bytes(serialization.Encoding.PEM))

    def issue(self, host: str = "127.0.0.1", valid_for: dt.timedelta = DAY, password: bytes = b"") -> Issued:
        """Sign a certificate of a host, for servers and clients; one that is valid for less than nothing has expired.

        With a password its key is encrypted.
        """
        self._issued += 1
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.IPAddress(ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
        draft = _draft(_named(host), key.public_key(), self._name, valid_for)
        draft = draft.add_extension(x509.SubjectAlternativeName([subject]), critical=False)
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        draft = draft.add_extension(usages, critical=False).add_extension(authority, critical=False)
        made = draft.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        stem = f"{self.file.stem}-{self._issued}"
        issued = Issued(self._folder / f"{stem}.pem", self._folder / f"{stem}.key")
        issued.certificate.write_bytes(made)
        encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        form = serialization.PrivateFormat.PKCS8
        issued.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))
        return issued


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _draft(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name, valid_for: dt.timedelta
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    draft = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    draft = draft.serial_number(x509.random_serial_number()).not_valid_before(now - 2 * DAY)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key)
    return draft.not_valid_after(now + valid_for).add_extension(identifier, critical=False)
