"""A registered model that was altered is refused on download, on load and by the server; with
DISTILLERY_VERIFY_KEY, one that is not signed or wrongly signed too. Files are really altered."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from distillery.errors import CredentialsError, RegistryError
from distillery.records import RegisteredModel
from distillery.registry.local import LocalRegistry
from distillery.registry.manifest import verify_before_loading
from distillery.registry.signing import check_keys, sign, verify_signature
from distillery.serving import running, server
from distillery.storage.digests import sha256_of

pytestmark = [pytest.mark.security, pytest.mark.usefixtures("one_registry")]

PRIVATE = Ed25519PrivateKey.generate()
STRANGER = Ed25519PrivateKey.generate()
NAME = "signed-student"


class LoadedError(Exception):
    """The model was verified, and would be loaded now."""


def private_pem(key: Ed25519PrivateKey, protection: KeySerializationEncryption) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection).decode()


def public_pem(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.fixture
def signing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_SIGNING_KEY", private_pem(PRIVATE, NoEncryption()))


@pytest.fixture
def verifying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_VERIFY_KEY", public_pem(PRIVATE))


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise LoadedError

    monkeypatch.setattr(running, "ServedStudent", load)


def registered(tmp_path: Path, weights: str = "weights", name: str = NAME) -> RegisteredModel:
    folder = tmp_path / f"onnx-{weights}"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "genai_config.json").write_text("{}")
    (folder / "model.onnx.data").write_text(weights * 100)
    (folder / "tokenizer" / "vocabulary.txt").write_text("a b")
    return LocalRegistry().register(folder, name, {}, {"accuracy": 0.875, "of": str(tmp_path)})


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_config(folder: Path, _: Path) -> None:
    flip_a_byte(folder / "genai_config.json")


def flip_weights(folder: Path, _: Path) -> None:
    flip_a_byte(folder / "model.onnx.data")


def flip_tokenizer(folder: Path, _: Path) -> None:
    flip_a_byte(folder / "tokenizer" / "vocabulary.txt")


def remove_a_file(folder: Path, _: Path) -> None:
    (folder / "tokenizer" / "vocabulary.txt").unlink()


def add_a_file(folder: Path, _: Path) -> None:
    (folder / "extra.py").write_text("import os")


def swap_manifests(folder: Path, other: Path) -> None:
    (folder / "manifest.json").write_bytes((other / "manifest.json").read_bytes())


def edit_manifest(folder: Path, _: Path) -> None:
    """Change what the manifest says, so that its list of files still holds."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["provenance"]["accuracy"] = 0.99
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite_consistently(folder: Path, _: Path) -> None:
    """Change a file, and the manifest to match."""
    flip_weights(folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        entry["sha256"] = sha256_of(folder / entry["path"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def remove_manifest(folder: Path, _: Path) -> None:
    (folder / "manifest.json").unlink()


def remove_signature(folder: Path, _: Path) -> None:
    (folder / "manifest.sig").unlink()


def swap_signatures(folder: Path, other: Path) -> None:
    (folder / "manifest.sig").write_bytes((other / "manifest.sig").read_bytes())


def spoil_signature(folder: Path, _: Path) -> None:
    (folder / "manifest.sig").write_text("no base64 at all é")


FILES = [flip_config, flip_weights, flip_tokenizer, remove_a_file, add_a_file, swap_manifests]
ONLY_BY_SIGNATURE = [
    edit_manifest,
    rewrite_consistently,
    remove_manifest,
    remove_signature,
    swap_signatures,
    spoil_signature,
]
Change = Callable[[Path, Path], None]


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(RegistryError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def downloaded(tmp_path: Path) -> tuple[Path, Path]:
    """The folders of two versions."""
    registry, folders = LocalRegistry(), []
    for weights in ("first", "second"):
        model = registered(tmp_path, weights)
        folders.append(registry.download(model, tmp_path / f"down-{weights}"))
    return folders[0], folders[1]


def test_an_unaltered_folder_is_loaded(tmp_path: Path) -> None:
    folder, _ = downloaded(tmp_path)
    verify_before_loading(folder)
    with pytest.raises(LoadedError):
        server.serve(folder, "student")


@pytest.mark.parametrize("change", FILES)
def test_an_altered_folder_is_not_loaded(tmp_path: Path, change: Change) -> None:
    folder, other = downloaded(tmp_path)
    change(folder, other)
    said = refused(lambda: verify_before_loading(folder))
    assert f"{folder}: " in said
    assert "download it again" in said
    assert refused(lambda: server.serve(folder, "student")) == said


@pytest.mark.parametrize("change", [*FILES, edit_manifest, rewrite_consistently, remove_manifest])
def test_an_altered_folder_is_not_downloaded(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    first, second = registered(tmp_path, "first"), registered(tmp_path, "second")
    change(Path(first.artifact.uri), Path(second.artifact.uri))
    target = tmp_path / "down"
    said = refused(lambda: LocalRegistry().download(first, target))
    assert f"{NAME} version {first.version}: " in said
    assert not target.exists()


@pytest.mark.usefixtures("signing", "verifying")
def test_a_signed_model_is_downloaded_and_loaded(tmp_path: Path) -> None:
    folder, _ = downloaded(tmp_path)
    verify_before_loading(folder)
    with pytest.raises(LoadedError):
        server.serve(folder, "student")
    again = LocalRegistry().register(folder, "another-signed", {}, {"of": str(tmp_path)})
    assert "manifest.sig" not in json.dumps(LocalRegistry().provenance(again))


@pytest.mark.usefixtures("signing", "verifying")
@pytest.mark.parametrize("change", [*FILES, *ONLY_BY_SIGNATURE])
def test_with_a_key_nothing_altered_is_loaded(tmp_path: Path, change: Change) -> None:
    folder, other = downloaded(tmp_path)
    change(folder, other)
    refused(lambda: verify_before_loading(folder))
    refused(lambda: server.serve(folder, "student"))


@pytest.mark.usefixtures("verifying")
def test_an_unsigned_model_is_refused_until_it_is_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = LocalRegistry()
    model = registered(tmp_path)
    said = refused(lambda: registry.download(model, tmp_path / "down"))
    assert "not signed" in said
    assert not registry.is_whole(model)
    with pytest.raises(CredentialsError, match="DISTILLERY_SIGNING_KEY: not set"):
        registry.sign(model)

    monkeypatch.setenv("DISTILLERY_SIGNING_KEY", private_pem(STRANGER, NoEncryption()))
    stranger = registry.sign(model)
    assert registry.get(NAME, model.version) == stranger
    said = refused(lambda: registry.download(stranger, tmp_path / "down"))
    assert "its signature is not that of DISTILLERY_VERIFY_KEY" in said

    monkeypatch.setenv("DISTILLERY_SIGNING_KEY", private_pem(PRIVATE, NoEncryption()))
    signed = registry.sign(model)
    verify_before_loading(registry.download(signed, tmp_path / "down"))
    assert registry.is_whole(signed)


def test_a_folder_that_was_downloaded_before_it_was_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = LocalRegistry()
    model = registered(tmp_path)
    folder = registry.download(model, tmp_path / "down")
    monkeypatch.setenv("DISTILLERY_SIGNING_KEY", private_pem(PRIVATE, NoEncryption()))
    signed = registry.sign(model)
    monkeypatch.setenv("DISTILLERY_VERIFY_KEY", public_pem(PRIVATE))
    refused(lambda: verify_before_loading(folder))
    assert "not signed" in refused(lambda: registry.download(model, folder))
    registry.download(signed, folder)
    verify_before_loading(folder)


def test_an_exported_folder_is_served_unless_a_key_asks_for_signed_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("genai_config.json").write_text("{}")
    with pytest.raises(LoadedError):
        server.serve(tmp_path, "student")
    monkeypatch.setenv("DISTILLERY_VERIFY_KEY", public_pem(PRIVATE))
    said = refused(lambda: server.serve(tmp_path, "student"))
    assert "manifest.json: missing" in said
    monkeypatch.delenv("DISTILLERY_VERIFY_KEY")
    tmp_path.joinpath("manifest.sig").write_text("of what was here")
    assert refused(lambda: server.serve(tmp_path, "student")) == said


def test_the_server_s_process_says_one_line(tmp_path: Path, signing: None, verifying: None) -> None:
    folder, other = downloaded(tmp_path)
    swap_signatures(folder, other)
    command = [sys.executable, "-m", "distillery.serving", str(folder), "--name", "student"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "its signature is not that of DISTILLERY_VERIFY_KEY" in done.stderr


def test_keys_may_be_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = tmp_path / "signing.pem", tmp_path / "verify.pem"
    private.write_text(private_pem(PRIVATE, NoEncryption()))
    public.write_text(public_pem(PRIVATE))
    monkeypatch.setenv("DISTILLERY_SIGNING_KEY", str(private))
    monkeypatch.setenv("DISTILLERY_VERIFY_KEY", str(public))
    signature = sign(b"content")
    verify_signature(b"content", signature, "it")
    refused(lambda: verify_signature(b"other", signature, "it"))


def test_a_run_that_could_not_download_its_own_model_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_keys()
    monkeypatch.setenv("DISTILLERY_VERIFY_KEY", public_pem(PRIVATE))
    with pytest.raises(CredentialsError, match="DISTILLERY_SIGNING_KEY: not set, while"):
        check_keys()
    monkeypatch.setenv("DISTILLERY_SIGNING_KEY", private_pem(STRANGER, NoEncryption()))
    with pytest.raises(CredentialsError, match="not the public key of DISTILLERY_SIGNING_KEY"):
        check_keys()
    monkeypatch.setenv("DISTILLERY_SIGNING_KEY", private_pem(PRIVATE, NoEncryption()))
    check_keys()


EC = generate_private_key(SECP256R1())
SECRET = private_pem(PRIVATE, BestAvailableEncryption(b"password"))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("/no/such.pem", "neither a PEM nor a file that can be read"),
        ("-----BEGIN PRIVATE KEY-----\nrubbish\n-----END PRIVATE KEY-----", "not an Ed25519"),
        (SECRET, "without a password"),
        (
            EC.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            "not an Ed25519 private key",
        ),
    ],
)
def test_a_key_that_does_not_sign_is_one_line(
    monkeypatch: pytest.MonkeyPatch, key: str, said: str
) -> None:
    monkeypatch.setenv("DISTILLERY_SIGNING_KEY", key)
    with pytest.raises(CredentialsError, match=r"^DISTILLERY_SIGNING_KEY: ") as caught:
        sign(b"content")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("DISTILLERY_VERIFY_KEY", key)
    with pytest.raises(CredentialsError, match=r"^DISTILLERY_VERIFY_KEY: ") as caught:
        verify_signature(b"content", "", "it")
    assert "rubbish" not in str(caught.value)
