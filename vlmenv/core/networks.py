"""Addresses of this machine, and the network interfaces that have them."""

from __future__ import annotations

import socket

import psutil


def local_address(host: str) -> str:
    """This machine's address in the network of `host`. Nothing is sent.

    Raises:
        OSError: The name is unknown, or there is no way to that host.
    """
    family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as asked:
        asked.connect(place)
        return str(asked.getsockname()[0])


def interfaces() -> dict[str, list[str]]:
    """The IP and hardware addresses of each network interface, by its name, such as "eth0"."""
    return {name: [one.address.partition("%")[0] for one in given] for name, given in psutil.net_if_addrs().items()}
