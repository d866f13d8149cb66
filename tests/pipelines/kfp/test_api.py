"""The way to Kubeflow Pipelines: private certificates and proxies, for the first call and all that follow."""

import datetime
import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipelines.cli import main
from pipelines.kfp.api import Connection, KfpApi, KfpError
from pipelines.kfp.http_route import route_to
from tests.kfp_api import KfpServer, running_kfp_server

PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXY_VARIABLES, *map(str.upper, PROXY_VARIABLES), "KFP_CA_CERT", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a PEM file with the key and the certificate of 127.0.0.1, signed by itself."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "private authority")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(2))
    signed = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(secret + signed.public_bytes(pem))
    return path


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[KfpServer]:
    with running_kfp_server(certificate=certificate) as server:
        yield server


@pytest.mark.parametrize("variable", ["KFP_CA_CERT", "SSL_CERT_FILE"])
def test_every_call_trusts_a_private_authority(
    tls_server: KfpServer, certificate: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(certificate))
    assert KfpApi(Connection(tls_server.host)).runs() == []
    assert {path for _, path, _ in tls_server.requests} == {"/healthz", "/runs"}


def test_an_unknown_authority_is_refused_and_the_variable_named(tls_server: KfpServer) -> None:
    with pytest.raises(KfpError, match=r"self-signed certificate.*set KFP_CA_CERT \(or SSL_CERT_FILE\) to a file"):
        KfpApi(Connection(tls_server.host))
    assert tls_server.requests == []


def test_a_certificate_for_another_name_is_not_answered_with_an_authority(
    tls_server: KfpServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_CA_CERT", str(certificate))
    with pytest.raises(KfpError, match=r"not valid for 'localhost'.*: set KFP_HOST to the name that the certificate"):
        KfpApi(Connection(tls_server.host.replace("127.0.0.1", "localhost")))


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_without_certificates_is_one_line_before_any_call(
    content: str | None, tls_server: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ca.pem"
    if content:
        path.write_text(content)
    monkeypatch.setenv("KFP_CA_CERT", str(path))
    with pytest.raises(KfpError, match=f"KFP_CA_CERT: must be a PEM file of certificates, got '{path}'"):
        KfpApi(Connection(tls_server.host))


def test_every_call_goes_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_kfp_server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.host.removeprefix("http://"))
        assert KfpApi(Connection("http://kfp.example.com")).runs() == []
        assert {path for _, path, _ in proxy.requests} == {"/healthz", "/runs"}


def test_a_port_forward_and_no_proxy_go_past_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", ".svc,kfp.example.com")
    with running_kfp_server() as server:
        assert KfpApi(Connection(server.host)).runs() == []
    assert route_to("http://kfp.example.com:8080").proxy == route_to("http://a.svc").proxy == ""
    assert route_to("http://other.example.com").proxy == "http://127.0.0.1:9"


def test_a_proxy_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(KfpError, match=r"^https://kfp.example.com: cannot be reached \(Connection refused\)"):
        KfpApi(Connection("https://kfp.example.com"))


@pytest.mark.parametrize(
    "host", ["http://me:hush@127.0.0.1:9", "https://me:hush@127.0.0.1:9/", "me:hush@host", "http://me:hu/sh@host"]
)
def test_a_password_in_the_host_is_never_printed(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_HOST", host)
    assert main(["status"]) == 1
    printed = capsys.readouterr()
    assert not {"hush", "hu/sh"} & set(re.split(r"[:@' ]", printed.err + printed.out))
    assert "pipelines: error: " in printed.err


@pytest.mark.parametrize(
    "host", ["http://[::1", "http://me:hush@[::1", "http://host:eighty", "http://:80", "http://host:99999"]
)
def test_a_host_that_is_no_address_is_told_by_the_name_of_its_variable(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_HOST", host)
    assert main(["status"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("pipelines: error: KFP_HOST: must be an address such as http://localhost:8080, got 'http://")
    assert said.count("\n") == 1 and "hush" not in said
