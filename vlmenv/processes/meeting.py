"""How the ranks find each other."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Final

from accelerate import PartialState

from vlmenv.core.errors import require
from vlmenv.core.networks import interfaces, local_address
from vlmenv.processes.launch import end_with_parent

INTERFACE: Final = "GLOO_SOCKET_IFNAME"
"""The variable that names the network interface at which gloo listens."""
_FAR: Final = "192.0.2.1"
"""An address that no machine has (RFC 5737): the way there is the default route."""


def meet(*, cpu: bool, limit: timedelta | None = None) -> PartialState:
    """Finds the other ranks, once; whatever asks for them later gets the same.

    Args:
        cpu: If true, no GPU is used.
        limit: How long a rank waits for the others. Default: as long as PyTorch lets it.

    Raises:
        ConfigError: `GLOO_SOCKET_IFNAME` names no network interface of this machine.
        RuntimeError: They do not reach each other.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if ranks > 1 and INTERFACE in os.environ:
        _check_interfaces(os.environ[INTERFACE].split(","))
    elif ranks > ranks_here:
        _choose_interface()
    state = PartialState(cpu=cpu, **({} if limit is None else {"timeout": limit}))
    if state.num_processes > 1:
        end_with_parent()
    return state


def _choose_interface() -> None:
    """Lets gloo listen in the network by which this machine reaches the main rank's.

    By itself, gloo listens at the address of the machine's name, which Debian and Ubuntu let be 127.0.1.1. So the main
    rank's machine may know its own name: then the default route decides.
    """
    for host in (os.environ.get("MASTER_ADDR", "localhost"), _FAR):
        with suppress(OSError):
            address = local_address(host)
            having = [name for name, addresses in interfaces().items() if address in addresses]
            if having and not ipaddress.ip_address(address).is_loopback:
                os.environ[INTERFACE] = having[0]
                return


def _check_interfaces(named: Sequence[str]) -> None:
    there = interfaces()
    for name in named:
        require(name in there, f"{INTERFACE} names {name!r}: network interfaces of this machine are {', '.join(there)}")
