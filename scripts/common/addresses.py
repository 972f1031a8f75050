"""Addresses of one machine: what HOST means, what a client on this machine asks for it, and how a URL writes it.

Opens no connection; a name is resolved, an address is not.
"""

from __future__ import annotations

import errno
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

LOOPBACK = "127.0.0.1"


class AddressError(Exception):
    """HOST is of no use here; the message says why, and what to set."""


def resolve(host: str) -> str:
    """The address that HOST stands for, as servers bind it: itself, or a name's first one, IPv4 before IPv6.

    Raises AddressError.
    """
    found = _literal(host)
    if found is None:
        found = min((ip_address(item) for item in _look_up(host)), key=lambda item: item.version)
    if isinstance(found, IPv6Address) and found.scope_id:
        raise AddressError(f"HOST={host!r} belongs to one link: use an address of this machine without '%'")
    return str(found)


def asked_address(host: str) -> str:
    """The address that a client on this machine asks: loopback for a server on all addresses, else the server's own.

    Raises AddressError.
    """
    address = resolve(host)
    return LOOPBACK if ip_address(address).is_unspecified else address


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address. A name that is not `localhost` could be any machine's."""
    found = _literal(host)
    return found.is_loopback if found is not None else host.lower().rstrip(".") == "localhost"


def is_ipv6(host: str) -> bool:
    """Whether HOST is an IPv6 address that is no IPv4 address in disguise."""
    return isinstance(_literal(host), IPv6Address)


def url_of(host: str, port: int, path: str = "") -> str:
    """`http://host:port/path`, an IPv6 address in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen on `host`:`port` now. Raises AddressError for an address of another machine."""
    address = resolve(host)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise AddressError(f"HOST={host} is no address of this machine: use one, or 0.0.0.0 for all") from None
            return False
    return True


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    """The address that is written there, an IPv4-mapped one as IPv4; None for a name."""
    plain = host.removesuffix(".")
    try:
        found = ip_address(plain[1:-1] if plain.startswith("[") and plain.endswith("]") else plain)
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _look_up(host: str) -> list[str]:
    """All addresses of a name. Raises AddressError."""
    try:
        if not host:
            raise OSError("it is empty")
        return [str(item[4][0]) for item in socket.getaddrinfo(host.removesuffix("."), None, type=socket.SOCK_STREAM)]
    except (OSError, ValueError) as error:  # UnicodeError is a ValueError: a name with an empty or too long part
        why = getattr(error, "strerror", None) or error
        raise AddressError(f"HOST={host!r} is neither an address nor a name that resolves: {why}") from None
