"""Makes a CA, the SuperLink's certificate, and a key pair for every node.

    python keys.py

Files that exist already are not changed, so a client that is added later gets only what it lacks. A
site that wants to make its own private key runs ``ssh-keygen -t ecdsa -b 384 -N "" -f client.key``
and sends its ``client.key.pub``, which belongs into ``nodes/CLIENT/``. For a new server certificate
(other names in server/superlink.env, or one that expires) first remove server/server.crt, and
server/server.key too for another key. It needs ca/ca.key; new nodes need nothing from ca/.

ca/ca.key stays here or goes to a safe: no machine that runs anything needs it. server/ goes to the
SuperLink's machine, and nodes/CLIENT/ to that client's machine.
"""

import ipaddress
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

FOLDER = Path(__file__).resolve().parent
CA_DAYS, SERVER_DAYS = 3650, 730
USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
PEM = serialization.Encoding.PEM


def main() -> None:
    """Make the files that are missing, and print their names."""
    ca, server = FOLDER / "ca", FOLDER / "server"
    # the CA's own folder may be in a safe
    own = server / "ca.crt" if (server / "ca.crt").exists() else ca / "ca.crt"
    if not own.exists():
        ca.mkdir(exist_ok=True, mode=0o700)
        if not (ca / "ca.key").exists():
            write_private(ca / "ca.key", pem(new_key()))
        write(own, ca_certificate(private_key(ca / "ca.key")).public_bytes(PEM))
    certificate = x509.load_pem_x509_certificate(own.read_bytes())
    if (server / "server.crt").exists():
        again = "remove server/server.crt too, for both to be made anew"
        expect((server / "server.key").exists(), f"server/server.key is gone: {again}")
    else:
        sign_server(ca / "ca.key", own, certificate)
    nodes = sorted(path for path in (FOLDER / "nodes").iterdir() if path.is_dir())
    for folder in (server, *nodes):
        if not (folder / "ca.crt").exists():
            write(folder / "ca.crt", certificate.public_bytes(PEM))
    for folder in nodes:
        if not (folder / "client.key.pub").exists():
            make_node_key(folder)


def sign_server(ca_key: Path, own: Path, certificate: x509.Certificate) -> None:
    """Make the server's certificate, and its key where that is missing."""
    back = "put it back from where it is kept, to sign the server's certificate"
    expect(ca_key.exists(), f"ca/ca.key is not here: {back}")
    key, server = private_key(ca_key), FOLDER / "server"
    belongs = key.public_key() == certificate.public_key()
    expect(belongs, f"ca/ca.key is not the key of {own.relative_to(FOLDER)}")
    if not (server / "server.key").exists():
        write_private(server / "server.key", pem(new_key()))
    public = private_key(server / "server.key").public_key()
    signed = server_certificate(names(server / "superlink.env"), public, certificate, key)
    write(server / "server.crt", signed.public_bytes(PEM))


def make_node_key(folder: Path) -> None:
    """Make a node's public key, and its private key where that is missing."""
    path = folder / "client.key"
    if not path.exists():
        form = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        write_private(path, new_key().private_bytes(PEM, *form))
    key = serialization.load_ssh_private_key(path.read_bytes(), None)
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    write(folder / "client.key.pub", key.public_key().public_bytes(*openssh) + b"\n")


def expect(condition: bool, otherwise: str) -> None:
    """End with a message unless the condition holds."""
    if not condition:
        sys.exit(otherwise)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key of the kind that Flower accepts."""
    return ec.generate_private_key(ec.SECP384R1())


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key as `pem` wrote it."""
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        sys.exit(f"{path.relative_to(FOLDER)}: expected a private key of an elliptic curve")
    return key


def names(env: Path) -> list[str]:
    """The server's names and addresses, and this machine's own ones."""
    (line,) = [line for line in env.read_text().splitlines() if line.startswith("NAMES=")]
    given = line.removeprefix("NAMES=").strip("\"'").split()
    return list(dict.fromkeys([*given, "localhost", "127.0.0.1", "::1"]))


def ca_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The CA's own certificate."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedGradNorm deployment CA")])
    usage = usages(key_cert_sign=True, crl_sign=True)
    own = draft(name, name, key.public_key(), CA_DAYS)
    own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    own = own.add_extension(usage, critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return own.add_extension(identifier, critical=False).sign(key, hashes.SHA384())


def server_certificate(
    names: list[str],
    public: ec.EllipticCurvePublicKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """A certificate for a server with these names and addresses."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    builder = draft(subject, ca.subject, public, SERVER_DAYS)
    for extension, critical in (
        (x509.SubjectAlternativeName([general_name(name) for name in names]), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (usages(digital_signature=True), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectKeyIdentifier.from_public_key(public), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False),
    ):
        builder = builder.add_extension(extension, critical)
    return builder.sign(ca_key, hashes.SHA384())


def draft(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    """A certificate that is not signed yet."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def usages(**wanted: bool) -> x509.KeyUsage:
    """What a key may be used for."""
    return x509.KeyUsage(**{name: wanted.get(name, False) for name in USAGES})


def general_name(name: str) -> x509.GeneralName:
    """A name or an address as a certificate holds it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as text."""
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def write_private(path: Path, content: bytes) -> None:
    """Write a file for its owner alone. Raises FileExistsError: no key is ever replaced."""
    write(path, content, 0o600)


def write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a new file, and print its name."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    print(path.relative_to(FOLDER))  # noqa: T201  # a command prints


if __name__ == "__main__":
    main()
