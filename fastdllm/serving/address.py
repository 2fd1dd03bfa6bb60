# SPDX-License-Identifier: Apache-2.0
"""Where a server listens and who may address it, asked before a model is loaded for it."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence

OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")  # of the interface that only this machine reaches


def host_name(text: str) -> str:
    """A name as Host headers have it, without a port: in small letters, an address of IPv6 in brackets. ValueError for what
    no header can hold."""
    name = text.lower()
    try:
        if ":" in name:
            name = f"[{ipaddress.IPv6Address(name.removeprefix('[').removesuffix(']'))}]"
    except ValueError:
        name = ""
    if not name or not name.isascii() or not name.isprintable() or any(letter in name for letter in " /*@"):
        raise ValueError(f"the name of a host must be a name or an address, without a port, not {text[:60]!r}")
    return name


def check_key(key: str) -> None:
    """ValueError for a bearer token that no header holds as it is, and for an empty one, which anybody has."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            "the API key must be of visible letters of ASCII, without blanks" + ("" if key else "; it is empty")
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an interface, however its address is written: ::1, LOCALHOST, 127.1, 127.0.0.2."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)} if host else set()
    except (OSError, UnicodeError):
        return False
    addresses = [ipaddress.ip_address(str(text).partition("%")[0]) for text in found]
    mapped = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    return bool(mapped) and all(address.is_loopback for address in mapped)


def free_port(host: str, ports: Sequence[int]) -> int:
    """The first port that a server can listen on. Raises OSError where all are taken, or the host is not this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE and len(ports) > 1:
                    continue
                raise OSError(_why_not(host, port, error)) from error
            return port
    raise OSError(f"no port from {ports[0]} to {ports[-1]} is free; --port takes another one")


def _why_not(host: str, port: int, error: OSError) -> str:
    """Why nothing can listen there: the port is taken or reserved, else the address is none of this machine's."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken; --port takes another one"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} of {host} cannot be used: {error.strerror}; --port takes another one"
    return f"--host {host} is no address of this machine: {error.strerror}; 127.0.0.1 and 0.0.0.0 are"
