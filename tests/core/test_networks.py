"""Addresses and interfaces of this machine."""

from __future__ import annotations

import socket

import pytest

from vlmenv.core.networks import interfaces, local_address


def test_the_address_is_that_on_the_way_to_a_host() -> None:
    assert local_address("localhost") in ("127.0.0.1", "::1")
    assert local_address("127.0.0.1") == "127.0.0.1"
    if socket.has_ipv6:
        assert local_address("::1") == "::1"
    with pytest.raises(OSError, match=r"not known|resolution"):
        local_address("none.invalid")


def test_interfaces_are_those_that_the_system_names() -> None:
    found = interfaces()
    assert set(found) <= {name for _, name in socket.if_nameindex()}
    assert sum("127.0.0.1" in addresses for addresses in found.values()) == 1
