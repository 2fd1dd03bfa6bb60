# SPDX-License-Identifier: Apache-2.0
"""Whether a server can listen at an address, asked before a model is loaded for it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence


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
