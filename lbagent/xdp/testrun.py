# SPDX-License-Identifier: Apache-2.0
"""One packet through the loaded program and the live maps, without a trace: the proof and `lbctl trace`.

A packet that arrives on interface 1 (loopback) is a trial to ``ebpf/lb.c``: it takes the whole
journey, changes no flow and no counter, and the return value tells what was decided. That is also
what BPF_PROG_TEST_RUN does when it is given no context, so a test run is a trial by default.
"""

import ipaddress
import os
import struct
import time
from dataclasses import dataclass

from lbagent.errors import XdpError
from lbagent.model.service import Protocol
from lbagent.model.vip import Vip
from lbagent.xdp.bpf import load_program, run_packet
from lbagent.xdp.verdict import BY_NUMBER, Verdict

_ETH_IP4, _ETH_IP6 = 0x0800, 0x86DD
_TCP, _UDP = 6, 17
_SYN = 0x02
_XDP_MD = struct.Struct("<6I")
_ACTIONS = ("aborted", "drop", "pass", "tx", "redirect")
_ENCAPSULATED = 256  # bytes a packet may grow by


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the program decided. ``packet`` as it would leave; ``backend_id`` 0: none was chosen."""

    action: str
    verdict: Verdict
    backend_id: int
    packet: bytes


def trial(program_fd: int, packet: bytes) -> Trial:
    """Ask the loaded program what it would do with this frame."""
    run = run_packet(program_fd, packet, room=len(packet) + _ENCAPSULATED)
    action, verdict = run.verdict & 0xFF, BY_NUMBER.get(run.verdict >> 8 & 0xFF)
    if action >= len(_ACTIONS) or verdict is None:
        raise XdpError(f"the loaded program is not ours: a trial returned {run.verdict:#x}")
    return Trial(action=_ACTIONS[action], verdict=verdict, backend_id=run.verdict >> 16, packet=run.packet)


def run_on(program_fd: int, packet: bytes, ifindex: int) -> tuple[str, bytes]:
    """The real thing, for tests: as if the frame had arrived on this interface. -> (action, packet)."""
    context = _XDP_MD.pack(0, len(packet), 0, ifindex, 0, 0)
    run = run_packet(program_fd, packet, context=context, room=len(packet) + _ENCAPSULATED)
    return _ACTIONS[run.verdict], run.packet


def packet_to(vip: Vip, *, source: str, source_port: int = 40000, flags: int = _SYN) -> bytes:
    """A frame from a client to a VIP: a SYN, or a UDP datagram of four bytes."""
    if vip.protocol is Protocol.TCP:
        number = _TCP
        segment = struct.pack("!HHIIBBHHH", source_port, vip.port, 1, 0, 5 << 4, flags, 65535, 0, 0)
        check_at = 16
    else:
        number = _UDP
        segment = struct.pack("!HHHH4s", source_port, vip.port, 12, 0, b"test")
        check_at = 6
    sender, receiver = ipaddress.ip_address(source), ipaddress.ip_address(vip.address)
    pseudo = sender.packed + receiver.packed + struct.pack("!II", len(segment), number)
    check = _checksum(pseudo + segment) or 0xFFFF
    segment = segment[:check_at] + check.to_bytes(2, "big") + segment[check_at + 2 :]
    if vip.family == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0x4000, 64, number, 0)
        head += sender.packed + receiver.packed
        head = head[:10] + _checksum(head).to_bytes(2, "big") + head[12:]
        ethertype = _ETH_IP4
    else:
        head = struct.pack("!IHBB", 6 << 28, len(segment), number, 64) + sender.packed + receiver.packed
        ethertype = _ETH_IP6
    frame = bytes.fromhex("020000000001020000000002") + ethertype.to_bytes(2, "big") + head + segment
    return frame.ljust(60, b"\0")


def _checksum(data: bytes) -> int:
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


# call bpf_jiffies64; exit
_READ_JIFFIES = struct.pack("<BBhiBBhi", 0x85, 0, 0, 118, 0x95, 0, 0, 0)
_KNOWN_HZ = (100, 250, 300, 1000)


def kernel_hz() -> int:
    """Jiffies per second of this kernel, measured in a tenth of one: no file tells it reliably."""
    program = load_program(_READ_JIFFIES, name="lb_jiffies")
    frame = bytes(64)
    try:
        start, before = time.monotonic(), run_packet(program, frame).verdict
        time.sleep(0.1)
        now, after = time.monotonic(), run_packet(program, frame).verdict
    finally:
        os.close(program)
    rate = ((after - before) & 0xFFFFFFFF) / (now - start)
    nearest: int = min(_KNOWN_HZ, key=lambda hz: abs(hz - rate))
    return nearest
