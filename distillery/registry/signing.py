"""Signatures of manifests: Ed25519 (RFC 8032), by the package cryptography.

A signature covers the bytes of manifest.json, which names every other file's SHA-256. It is kept as
a tag of the version, and as manifest.sig (base64) in each downloaded folder.
"""

import base64
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from distillery.errors import CredentialsError, RegistryError
from distillery.settings import LocalSettings

SIGNATURE = "manifest.sig"

SIGNATURE_TAG = "manifest_signature"


def sign(content: bytes) -> str:
    """Return the signature of `content` by DISTILLERY_SIGNING_KEY, in base64; "" if it is not set.

    Raises CredentialsError where the setting holds no Ed25519 key.
    """
    key = signing_key()
    return base64.b64encode(key.sign(content)).decode() if key else ""


def must_be_signed() -> bool:
    """Return whether this machine takes signed models only: DISTILLERY_VERIFY_KEY is set."""
    return bool(LocalSettings().verify_key)


def verify_signature(content: bytes, signature: str, model: str) -> None:
    """Raise RegistryError unless `signature` (base64) is that of `content` by the owner of
    DISTILLERY_VERIFY_KEY; without this setting nothing is checked.

    `model` names what is verified in the message. Raises CredentialsError where the setting holds
    no Ed25519 key.
    """
    key = verify_key()
    if key is None:
        return
    if not signature:
        raise RegistryError(
            f"{model}: not signed, and DISTILLERY_VERIFY_KEY asks for it; sign it with "
            "`distillery models sign`"
        )
    try:
        key.verify(base64.b64decode(signature, validate=True), content)
    except (InvalidSignature, ValueError):
        raise RegistryError(
            f"{model}: its signature is not that of DISTILLERY_VERIFY_KEY; don't use this model "
            "unless you know why"
        ) from None


def check_keys() -> None:
    """Raise CredentialsError if this machine could not download what it registers: one of the keys
    can't be read, or DISTILLERY_VERIFY_KEY is not that of DISTILLERY_SIGNING_KEY."""
    private, public = signing_key(), verify_key()
    if public is None:
        return
    if private is None:
        raise CredentialsError(
            "DISTILLERY_SIGNING_KEY: not set, while DISTILLERY_VERIFY_KEY asks for signed models; "
            "set it, so that the model of this run is signed"
        )
    if private.public_key() != public:
        raise CredentialsError(
            "DISTILLERY_VERIFY_KEY: not the public key of DISTILLERY_SIGNING_KEY; make it with "
            "`openssl pkey -pubout`"
        )


def signing_key() -> Ed25519PrivateKey | None:
    """Return the key in DISTILLERY_SIGNING_KEY, if it is set. Raises CredentialsError."""
    value = LocalSettings().signing_key.get_secret_value()
    if not value:
        return None
    pem = read_pem("DISTILLERY_SIGNING_KEY", value)
    try:
        key = load_pem_private_key(pem, password=None)
    # cryptography raises TypeError for a key that is protected by a password.
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise CredentialsError(
            "DISTILLERY_SIGNING_KEY: not an Ed25519 private key in PEM without a password; make "
            "one with `openssl genpkey -algorithm ed25519`"
        )
    return key


def verify_key() -> Ed25519PublicKey | None:
    """Return the key in DISTILLERY_VERIFY_KEY, if it is set. Raises CredentialsError."""
    value = LocalSettings().verify_key
    if not value:
        return None
    pem = read_pem("DISTILLERY_VERIFY_KEY", value)
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise CredentialsError(
            "DISTILLERY_VERIFY_KEY: not an Ed25519 public key in PEM; make it from the private key "
            "with `openssl pkey -pubout`"
        )
    return key


def read_pem(variable: str, value: str) -> bytes:
    """Return the PEM that a setting holds, or that is in the file that it names."""
    if "-----BEGIN" in value:
        return value.encode()
    try:
        return Path(value).expanduser().read_bytes()
    except OSError as error:
        raise CredentialsError(
            f"{variable}: neither a PEM nor a file that can be read ({error.strerror}); correct it"
        ) from None
