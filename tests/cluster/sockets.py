"""What processes listen on."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import psutil


def listening_outside_loopback(processes: Iterable[psutil.Process]) -> list[str]:
    """`process address:port` of every listening socket that other machines could reach."""
    found = []
    for process in processes:
        try:
            connections = process.net_connections(kind="inet")
            name = process.name()
        except psutil.Error:  # it ended meanwhile
            continue
        for connection in connections:
            if connection.status != psutil.CONN_LISTEN or not connection.laddr:
                continue
            address = ipaddress.ip_address(connection.laddr.ip)
            mapped = getattr(address, "ipv4_mapped", None)
            if not (mapped or address).is_loopback:
                found.append(f"{name} {address}:{connection.laddr.port}")
    return found
