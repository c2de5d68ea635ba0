"""The one way out to other hosts: who may be called, at which address, and for how long."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from receiving import (
    certificate,
    endless_body,
    endless_head,
    endless_interim,
    free_port,
    hang_up,
    huge_head,
    misbehaving,
    no_http,
    receiving,
    silence,
    speaking_tls,
)
from serving import ROOT, eventually

from diffusion_api.errors import Misconfigured, Unreachable, UrlRefused
from diffusion_api.fetch import Fetcher, closed, masked, origins, system_addresses

PATIENT = 60.0
"""Seconds; for requests that shall not run out of time."""

CLOSED = {
    "unspecified": ["0.0.0.0", "0.1.2.3", "::"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fd12:3456::1"],
    "shared": ["100.64.0.1", "100.127.255.255"],
    "link-local": ["169.254.0.1", "fe80::1", "fe80::1%1", "febf::1"],
    "multicast": ["224.0.0.1", "239.255.255.255", "ff02::1", "ff0e::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "benchmark": ["198.18.0.1", "198.19.255.255"],
    "reserved": [
        *("192.0.0.1", "192.88.99.1", "240.0.0.1", "255.255.255.255", "64:ff9b:1::7f00:1", "100::1", "2001:2::1"),
        *("fec0::1", "::127.0.0.1", "::ffff:0:7f00:1", "4000::1"),
        *("2001:0:7f00:1::", "2001:0:5db8:d822::80ff:fffe"),  # Teredo: server 127.0.0.1, client 127.0.0.1
    ],
    "IPv4-mapped": ["::ffff:127.0.0.1", "::ffff:8.8.8.8"],
    "6to4": ["2002:7f00:1::1", "2002:a00:1::1", "2002:808:808::1"],
}
METADATA = {
    "link-local": ["169.254.169.254", "169.254.170.2"],
    "cloud metadata": ["168.63.129.16"],
    "shared": ["100.100.100.200"],
    "reserved": ["192.0.0.192"],
    "private": ["fd00:ec2::254", "fd20:ce::254"],
}
OPEN = [
    *("1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "128.0.0.1", "168.63.129.17"),
    *("172.15.255.255", "172.32.0.0", "192.0.1.1", "192.167.255.255", "192.169.0.0", "223.255.255.255"),
    *("2001:200::1", "2001:4860:4860::8888", "2606:4700::1111", "3ffe::1", "64:ff9b::808:808"),
]


@pytest.mark.parametrize(
    ("kind", "address"), [(k, a) for table in (CLOSED, METADATA) for k, rows in table.items() for a in rows]
)
def test_no_address_that_is_not_public_is_called(kind: str, address: str) -> None:
    assert closed(ipaddress.ip_address(address)) == kind


@pytest.mark.parametrize("address", OPEN)
def test_public_addresses_may_be_called(address: str) -> None:
    assert closed(ipaddress.ip_address(address)) is None


@pytest.mark.parametrize(("kind", "address"), [(k, a) for k, rows in CLOSED.items() for a in rows if "." in a])
def test_an_address_behind_nat64_is_the_one_that_counts(kind: str, address: str) -> None:
    if ":" not in address:
        assert closed(ipaddress.ip_address(f"64:ff9b::{address}")) == kind


@given(st.ip_addresses())
@example(ipaddress.ip_address("192.0.0.9"))
def test_what_python_knows_not_to_be_public_is_closed(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if address in ipaddress.IPv6Network("64:ff9b::/96"):
        return
    if address.is_private or address.is_multicast or address.is_reserved or address.is_link_local:
        assert closed(address)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", []),
        (" , ", []),
        ("hooks.example.com", ["https://hooks.example.com:443"]),
        ("HOOKS.Example.com:8443", ["https://hooks.example.com:8443"]),
        ("http://hooks.example.com", ["http://hooks.example.com:80"]),
        ("https://hooks.example.com/", ["https://hooks.example.com:443"]),
        ("a.example, b.example:99", ["https://a.example:443", "https://b.example:99"]),
        ("bücher.example", ["https://xn--bcher-kva.example:443"]),
        ("127.0.0.1:9000", ["https://127.0.0.1:9000", "http://127.0.0.1:9000"]),
        ("10.0.0.7", ["https://10.0.0.7:443", "http://10.0.0.7:80"]),
        ("http://10.0.0.7:8080", ["http://10.0.0.7:8080"]),
        ("1.1.1.1", ["https://1.1.1.1:443"]),
        ("[::1]:9000", ["https://[::1]:9000", "http://[::1]:9000"]),
        ("http://[fd00:0::0:7]", ["http://[fd00::7]:80"]),
    ],
)
def test_the_operators_list_is_read(text: str, allowed: list[str]) -> None:
    assert [str(origin) for origin in origins(text)] == allowed


@pytest.mark.parametrize(
    "entry",
    [
        *("ftp://a.example", "a.example/path", "a.example?x", "a.example#x", "user@a.example", "user:pass@a.example"),
        *("*", "*.example.com", "a..example", "-a.example", "a.example.", "https://"),
        *("a.example:port", "a.example:0x1"),
        *("localhost:9000", "app:8080", "localhost.", "2130706433", "0177.1", "127.1", "0x7f.1", "127%2e0.0.1"),
        *("0.0.0.0:80", "169.254.169.254", "168.63.129.16", "224.0.0.1", "[::]:80", "[fe80::1]", "[::ffff:127.0.0.1]"),
        *("192.0.2.1", "10.0.0.0/8", "a.example\nb", "a b.example"),
    ],
)
def test_a_wrong_entry_of_the_operators_list_is_named(entry: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        origins(f"good.example,{entry}")
    assert str(caught.value).startswith(f"allowed host {entry.strip()!r}: ")


def test_a_private_name_is_refused_with_the_way_out() -> None:
    with pytest.raises(Misconfigured, match=r"for a private receiver write its address, such as http://127\.0\.0\.1"):
        origins("localhost:9000")


ALLOWED = origins("hooks.example.com, hooks.example.com:8443, http://plain.example.com, 127.0.0.1:9000")


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://hooks.example.com", "https://hooks.example.com:443"),
        ("HTTPS://HOOKS.example.COM:443/a?b#c", "https://hooks.example.com:443"),
        ("https://hooks.example.com:8443/", "https://hooks.example.com:8443"),
        ("http://plain.example.com/", "http://plain.example.com:80"),
        ("http://127.0.0.1:9000/", "http://127.0.0.1:9000"),
        ("https://127.0.0.1:9000/", "https://127.0.0.1:9000"),
    ],
)
def test_a_url_leads_to_an_allowed_origin(url: str, origin: str) -> None:
    assert str(Fetcher(ALLOWED).check(url, field="webhook")) == origin


@pytest.mark.parametrize(
    "url",
    [
        *("http://hooks.example.com/", "https://plain.example.com/", "https://hooks.example.com:80/"),
        *("https://hooks.example.com:0/", "https://hooks.example.com:99999/", "https://hooks.example.com:444/"),
        *("https://evil.example/", "https://hooks.example.com.evil.example/", "https://evilhooks.example.com/"),
        *("https://sub.hooks.example.com/", "https://hooks.example.com./", "https://evil.example/hooks.example.com"),
        *("https://evil.example?hooks.example.com", "https://evil.example#@hooks.example.com/"),
        *("https://evil.example\\@hooks.example.com/", "https://hooks.example.com\\@evil.example/"),
        *("https://hooks.example.com@evil.example/", "https://u@hooks.example.com/", "https://u:p@hooks.example.com/"),
        *("https://hooks.example.com%00.evil.example/", "https://hooks%2eexample.com/", "https://hooks。evil.example/"),
        *("http://127.0.0.1/", "http://127.0.0.1:80/", "http://127.0.0.2:9000/", "http://localhost:9000/"),
        *("http://localhost.:9000/", "http://2130706433:9000/", "http://0177.1:9000/", "http://127.1:9000/"),
        *("http://0x7f000001:9000/", "http://0:9000/", "http://0.0.0.0:9000/", "http://[::1]:9000/"),
        *("http://[::ffff:127.0.0.1]:9000/", "http://[::ffff:7f00:1]:9000/", "http://169.254.169.254/"),
        *(
            "http://[fd00:ec2::254]/",
            "http://metadata.google.internal/",
            "http://100.64.0.1/",
            "http://[fe80::1%25lo]/",
        ),
        *("file:///etc/passwd", "gopher://127.0.0.1:9000/", "ftp://hooks.example.com/", "data:,x", "javascript:1"),
        *("unix:/var/run/docker.sock", "//hooks.example.com/", "hooks.example.com", "/path", "", " ", "https://"),
        *("https:hooks.example.com", "https:///hooks.example.com", " https://hooks.example.com/", "https://[::1/"),
        *("https://hooks.example.com/\n", "https://hooks.example.com/\x00", "https://\uff48ooks.example.com/"),
        *(
            "https://hooks.example.com:443:80/",
            "https://xn--ls8h.example/",
        ),
        *("https://hooks.example.com/" + "x" * 2000, "https://" + "a" * 1900 + "/", "https://\ud800/"),
    ],
    ids=ascii,
)
def test_every_other_url_is_refused(url: str) -> None:
    with pytest.raises(UrlRefused, match=r"^webhook ") as caught:
        Fetcher(ALLOWED).check(url, field="webhook")
    assert caught.value.field == "webhook"
    assert len(str(caught.value)) < 400


def test_a_refusal_names_the_host_and_the_choices_but_no_credential() -> None:
    with pytest.raises(UrlRefused) as caught:
        Fetcher(origins("a.example,b.example:99")).check("https://evil.example/path?token=secret", field="webhook")
    assert str(caught.value) == (
        "webhook leads to https://evil.example:443; allowed: https://a.example:443, https://b.example:99"
    )


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://a.example/x", "https://a.example/x"),
        ("https://a.example/x?token=s3cret&b=s3cret&s3cret&=s3cret", "https://a.example/x?token=***&b=***&***&=***"),
        ("https://a.example/#s3cret", "https://a.example/"),
        ("https://a.example:99/?", "https://a.example:99/"),
    ],
)
def test_the_values_in_a_query_are_masked(url: str, shown: str) -> None:
    assert masked(url) == shown


def post(allowed: str, url: str, *, body: bytes = b"{}", total: float = PATIENT, **options: object) -> int:
    fetcher = Fetcher(origins(allowed), total=total, **options)  # type: ignore[arg-type]
    return asyncio.run(fetcher.post(url, body, {"X-Test": "1"}, field="webhook"))


def test_a_post_arrives_as_it_was_sent() -> None:
    with receiving(201) as receiver:
        assert post(receiver.host, f"{receiver.url}?a=b%20c", body=b"\x00\xff") == 201
    (heard,) = receiver.heard
    assert (heard.method, heard.path, heard.body) == ("POST", "/hook?a=b%20c", b"\x00\xff")
    assert heard.headers["host"] == receiver.host
    assert heard.headers["x-test"] == "1"
    assert "cookie" not in heard.headers
    assert "authorization" not in heard.headers


def test_nothing_is_posted_to_a_host_that_is_not_allowed() -> None:
    with receiving() as receiver, pytest.raises(UrlRefused):
        post("127.0.0.1:1", receiver.url)
    assert receiver.heard == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with receiving() as other, receiving(status, location=other.url) as receiver:
        assert post(f"{receiver.host},{other.host}", receiver.url) == status
    assert other.heard == []
    assert len(receiver.heard) == 1


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as proxy, receiving() as receiver:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy.host}")
            monkeypatch.setenv(name.lower(), f"http://{proxy.host}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert post(receiver.host, receiver.url) == 204
    assert proxy.heard == []


@pytest.mark.parametrize("behave", [silence, endless_head, endless_interim], ids=lambda f: f.__name__)
def test_a_receiver_that_never_answers_runs_out_of_time(behave: object) -> None:
    with misbehaving(behave) as receiver, pytest.raises(Unreachable, match=r"^no answer within 0\.5 s$"):  # type: ignore[arg-type]
        post(receiver.host, receiver.url, total=0.5)


def test_a_body_without_end_is_not_waited_for() -> None:
    with misbehaving(endless_body) as receiver:
        assert post(receiver.host, receiver.url) == 200


@pytest.mark.parametrize("behave", [huge_head, no_http, hang_up], ids=lambda value: value.__name__)
def test_an_answer_that_is_none_is_told_as_such(behave: object) -> None:
    with misbehaving(behave) as receiver, pytest.raises(Unreachable) as caught:  # type: ignore[arg-type]
        post(receiver.host, receiver.url)
    # The receiver hangs up with our request unread: what comes first, its end or what it said, is the kernel's choice.
    assert str(caught.value) in ("the answer was no HTTP", "connection reset by peer")


def test_a_receiver_that_is_down_is_told_as_such() -> None:
    port = free_port()
    with pytest.raises(Unreachable, match=r"^connection refused$"):
        post(f"127.0.0.1:{port}", f"http://127.0.0.1:{port}/")


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    with speaking_tls(pem) as port, pytest.raises(Unreachable, match=r"^its certificate is not valid: "):
        post(f"127.0.0.1:{port}", f"https://127.0.0.1:{port}/")


class Names:
    """A resolver whose answer changes with each question, the last one for good."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


connected: list[str] = []
"""Hosts to which this process has tried to connect, as the interpreter itself reports them."""


def _report(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        connected.append(str(arguments[1][0]))


sys.addaudithook(_report)


@pytest.mark.parametrize("address", [a for table in (CLOSED, METADATA) for rows in table.values() for a in rows])
def test_a_name_that_leads_to_such_an_address_is_not_called(address: str, caplog: pytest.LogCaptureFixture) -> None:
    connected.clear()
    names = Names([address])
    with pytest.raises(Unreachable) as caught:
        post("hooks.example.com", "https://hooks.example.com/", resolve=names)
    assert str(caught.value) == "its name leads to no address that may be called"  # one text for every kind
    assert address in caplog.text
    assert connected == []


def test_one_bad_address_among_good_ones_spoils_the_name() -> None:
    connected.clear()
    with pytest.raises(Unreachable, match="no address that may be called"):
        post("hooks.example.com", "https://hooks.example.com/", resolve=Names(["1.1.1.1", "10.0.0.1"]))
    assert connected == []


def test_what_is_checked_is_what_is_connected_to() -> None:
    connected.clear()
    names = Names(["3ffe::1", "3ffe::2"], ["127.0.0.1"])  # addresses of a network that was shut down in 2006
    fetcher = Fetcher(origins("hooks.example.com:8443"), resolve=names, connect=0.2, total=PATIENT)

    async def twice() -> list[str]:
        told = []
        for _ in range(2):
            with pytest.raises(Unreachable) as caught:
                await fetcher.post("https://hooks.example.com:8443/", b"", {}, field="webhook")
            told.append(str(caught.value))
        return told

    told = asyncio.run(twice())
    assert names.asked == [("hooks.example.com", 8443)] * 2
    assert connected == ["3ffe::1", "3ffe::2"]
    assert told[1] == "its name leads to no address that may be called"


def test_a_name_nobody_knows_is_told_as_such() -> None:
    def unknown(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    with pytest.raises(Unreachable, match=r"^the name \S+ cannot be looked up; is this machine online\?$"):
        post("hooks.example.com", "https://hooks.example.com/", resolve=unknown)


def test_a_look_up_without_end_runs_out_of_time() -> None:
    answer = threading.Event()

    def slow(host: str, port: int) -> Sequence[str]:
        answer.wait()
        return ["1.1.1.1"]

    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"^no answer within 0\.3 s$"):
        post("hooks.example.com", "https://hooks.example.com/", resolve=slow, total=0.3)
    assert time.monotonic() - began < PATIENT  # the thread that still looks it up is not waited for
    answer.set()
    eventually(lambda: not any(t.name == "look-up" for t in threading.enumerate()), "the look-up to end")


def test_the_systems_resolver_gives_addresses() -> None:
    assert system_addresses("127.0.0.1", 80) == ["127.0.0.1"]
    assert "127.0.0.1" in system_addresses("localhost", 80)
    with pytest.raises(socket.gaierror):
        system_addresses("nowhere.invalid", 80)


def test_a_name_is_called_at_its_address_with_tls_and_host_for_the_name(tmp_path: Path) -> None:
    """In a network of its own, where a public address is this machine's."""
    for tool in ("unshare", "ip"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    pem = certificate(tmp_path)
    program = [sys.executable, ROOT / "tests" / "outside.py", pem]
    alone = ["unshare", "--user", "--map-root-user", "--net", *program]
    done = subprocess.run(
        alone, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}, timeout=120
    )
    if "unshare" in done.stderr:
        pytest.skip(f"no network of its own here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "first": 204,
        "second": "its name leads to no address that may be called",
        "heard": [["hooks.example.com", "hooks.example.com", "93.184.216.34"]],  # SNI, Host, address
        "loopback": 0,
    }
