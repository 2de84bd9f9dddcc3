"""The kernel's sock_diag: the listening TCP sockets of a port. It knows sockets, not the processes that hold them."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from dataclasses import dataclass

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 0x1
_NLM_F_REQUEST_DUMP = _NLM_F_REQUEST | 0x300
_NLM_F_DUMP_INTR = 0x10
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_TCP_LISTEN = 10

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBBI HH 16s 16s I II")  # struct inet_diag_req_v2; its ports are in network order
_ANSWER = struct.Struct("=BBBB 2s2s 16s 16s I II IIIII")  # struct inet_diag_msg


@dataclass(frozen=True)
class ListeningSocket:
    """`queue` connections, of a little more than `limit`, wait to be accepted."""

    address: str
    inode: int
    queue: int
    limit: int
    uid: int


def listening_sockets(port: int) -> list[ListeningSocket]:
    """The TCP sockets that listen on `port` in this network namespace. Raises OSError where the kernel has no sock_diag."""
    return [found for family in (socket.AF_INET, socket.AF_INET6) for found in _dump(family, port)]


def inode_of(here: tuple[str, int], there: tuple[str, int]) -> int | None:
    """The inode of the end `here` of the TCP connection to `there`: 0 while no process has accepted it, None when there is no such end.

    Addresses are IPv4 or IPv6 literals, of one family. Raises OSError where the kernel has no sock_diag."""
    near, far = ipaddress.ip_address(here[0]), ipaddress.ip_address(there[0])
    family = socket.AF_INET if near.version == 4 else socket.AF_INET6
    ports = socket.htons(here[1]), socket.htons(there[1])
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF, *ports, near.packed, far.packed, 0, 0xFFFFFFFF, 0xFFFFFFFF)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(5.0)
        netlink.sendto(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request, (0, 0))
        data = netlink.recv(1 << 16)
    if _HEADER.unpack_from(data)[1] == _NLMSG_ERROR:
        error = -struct.unpack_from("=i", data, _HEADER.size)[0]
        if error == errno.ENOENT:
            return None
        raise OSError(error, f"sock_diag: {os.strerror(error)}")
    answer = _ANSWER.unpack_from(data, _HEADER.size)
    # Of a port that listens the kernel answers with the listening socket, where it has no such connection.
    return None if answer[1] == _TCP_LISTEN else int(answer[15])


def _dump(family: int, port: int) -> list[ListeningSocket]:
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << _TCP_LISTEN, socket.htons(port), 0, b"", b"", 0, 0xFFFFFFFF, 0xFFFFFFFF)
    while True:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(5.0)
            netlink.sendto(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0) + request, (0, 0))
            found = _answers(netlink, port)
        if found is not None:
            return found


def _answers(netlink: socket.socket, port: int) -> list[ListeningSocket] | None:
    """None when the kernel says that its table changed during the dump."""
    found: dict[int, ListeningSocket] = {}
    interrupted = False
    while True:
        data = netlink.recv(1 << 16)
        while len(data) >= _HEADER.size:
            length, kind, flags, _, _ = _HEADER.unpack_from(data)
            interrupted = interrupted or bool(flags & _NLM_F_DUMP_INTR)
            if kind == _NLMSG_DONE:
                return None if interrupted else list(found.values())
            if kind == _NLMSG_ERROR:
                error = -struct.unpack_from("=i", data, _HEADER.size)[0]
                raise OSError(error, f"sock_diag: {os.strerror(error)}")
            answer = _ANSWER.unpack_from(data, _HEADER.size)
            family, sport, source = answer[0], int.from_bytes(answer[4], "big"), answer[6]
            queue, limit, uid, inode = answer[12:16]
            if sport == port:
                found[inode] = ListeningSocket(_address(family, source, port), inode, queue, limit, uid)
            data = data[(length + 3) & ~3 :]


def _address(family: int, source: bytes, port: int) -> str:
    if family == socket.AF_INET:
        return f"{ipaddress.IPv4Address(source[:4])}:{port}"
    return f"[{ipaddress.IPv6Address(source)}]:{port}"
