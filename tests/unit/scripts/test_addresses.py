"""What HOST means: which address is bound, which one is asked, who else reaches it, and how a URL writes it."""

from __future__ import annotations

import socket

import pytest

from scripts.common import addresses
from scripts.common.addresses import AddressError, asked_address, is_free, is_ipv6, is_loopback, resolve, url_of
from scripts.serve.run_dir import Ports


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of this name with two addresses."""

    def look_up(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host != "gpu1":
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", ("fd00::7", 0, 0, 0)), (0, 0, 0, "", ("10.0.0.7", 0))]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", look_up)


@pytest.mark.parametrize(
    ("host", "bound", "asked", "loopback"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1", True),
        ("127.0.0.9", "127.0.0.9", "127.0.0.9", True),
        ("0.0.0.0", "0.0.0.0", "127.0.0.1", False),
        ("192.0.2.2", "192.0.2.2", "192.0.2.2", False),
        ("192.0.2.2.", "192.0.2.2", "192.0.2.2", False),
        ("::", "::", "127.0.0.1", False),
        ("[::]", "::", "127.0.0.1", False),
        ("::1", "::1", "::1", True),
        ("0:0:0:0:0:0:0:1", "::1", "::1", True),
        ("FD00::A", "fd00::a", "fd00::a", False),
        ("::ffff:127.0.0.1", "127.0.0.1", "127.0.0.1", True),
        ("::FFFF:0.0.0.0", "0.0.0.0", "127.0.0.1", False),
        ("gpu1", "10.0.0.7", "10.0.0.7", False),
        ("gpu1.", "10.0.0.7", "10.0.0.7", False),
    ],
)
def test_what_a_host_means(names: None, host: str, bound: str, asked: str, loopback: bool) -> None:
    assert (resolve(host), asked_address(host), is_loopback(host)) == (bound, asked, loopback)
    assert is_ipv6(bound) == (":" in bound)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "localhost."])
def test_localhost_is_this_machine(host: str) -> None:
    assert is_loopback(host) and is_loopback(resolve(host))


@pytest.mark.parametrize("host", ["127.example.org", "localhost.example.org", "1270.0.0.1", "", "127.0.0.1.2"])
def test_what_only_looks_like_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["nowhere", "a..b", "", "x" * 70, "a\nb", "127.0.0.1:80", "'; id", "fe80::1%eth0"])
def test_a_host_of_no_use_is_told_in_one_line(names: None, host: str) -> None:
    with pytest.raises(AddressError, match="HOST=") as told:
        resolve(host)
    assert "\n" not in str(told.value)


def test_ipv6_addresses_stand_in_brackets() -> None:
    assert url_of("::1", 80, "/x") == "http://[::1]:80/x"
    assert url_of("10.0.0.7", 80) == "http://10.0.0.7:80"


def test_a_port_is_looked_for_at_the_address_that_is_bound() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.listen()
        port = other.getsockname()[1]
        assert is_free(port) and is_free(port, "127.0.0.3")
        assert not is_free(port, "127.0.0.2") and not is_free(port, "0.0.0.0")
        assert port in Ports(port).taken("127.0.0.2") and port not in Ports(port).taken()
        # Management stays on loopback wherever inference is bound.
        assert port not in Ports(port - 1).taken("127.0.0.2")


def test_an_address_of_another_machine_is_not_called_a_taken_port() -> None:
    with pytest.raises(AddressError, match=r"192\.0\.2\.77 is no address of this machine"):
        is_free(9000, "192.0.2.77")
