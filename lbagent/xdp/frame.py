# SPDX-License-Identifier: Apache-2.0
"""A frame in words, header by header, for people who read ``lbctl trace``. Pure.

What is too short or unknown ends the list with what is left in hex; nothing raises.
"""

import ipaddress
import struct
from collections.abc import Iterator

Layer = dict[str, str | int]

_VLAN = (0x8100, 0x88A8)
_IP4, _IP6, _ARP = 0x0800, 0x86DD, 0x0806
_ICMP, _IPIP, _TCP, _UDP, _IP6IP, _ICMP6 = 1, 4, 6, 17, 41, 58
_FLAGS = ((2, "SYN"), (16, "ACK"), (1, "FIN"), (4, "RST"), (8, "PSH"), (32, "URG"))
_SHOWN_BYTES = 16


def layers(frame: bytes) -> list[Layer]:
    """The headers of an Ethernet frame, outermost first."""
    return list(_ethernet(frame))


def text(frame: bytes) -> str:
    """The same on one line: ``IP 192.0.2.9 > 203.0.113.1 ttl 64 | TCP 40000 > 80 SYN``."""
    return " | ".join(_line(layer) for layer in layers(frame))


def _line(layer: Layer) -> str:
    words = [str(layer["layer"])]
    if "source" in layer:
        words.append(f"{layer['source']} > {layer['destination']}")
    words += [f"{key} {value}" for key, value in layer.items() if key not in ("layer", "source", "destination")]
    return " ".join(words)


def _rest(data: bytes) -> Iterator[Layer]:
    shown = data.rstrip(b"\0")[:_SHOWN_BYTES]
    if shown:
        yield {"layer": "data", "bytes": len(data), "hex": shown.hex()}


def _ethernet(data: bytes) -> Iterator[Layer]:
    if len(data) < 14:
        yield from _rest(data)
        return
    kind = struct.unpack_from("!H", data, 12)[0]
    yield {"layer": "Ethernet", "source": data[6:12].hex(":"), "destination": data[:6].hex(":")}
    at = 14
    while kind in _VLAN and len(data) >= at + 4:
        control, kind = struct.unpack_from("!HH", data, at)
        yield {"layer": "VLAN", "id": control & 0xFFF}
        at += 4
    yield from _network(kind, data[at:])


def _network(kind: int, data: bytes) -> Iterator[Layer]:
    if kind == _IP4 and len(data) >= 20:
        yield from _ip4(data)
    elif kind == _IP6 and len(data) >= 40:
        yield from _ip6(data)
    elif kind == _ARP:
        yield {"layer": "ARP", "bytes": len(data)}
    else:
        yield {"layer": f"type 0x{kind:04x}", "bytes": len(data)}
        yield from _rest(data)


def _ip4(data: bytes) -> Iterator[Layer]:
    length, fragment, ttl, protocol = struct.unpack_from("!xxHxxHBB", data)
    head = (data[0] & 15) * 4
    layer: Layer = {
        "layer": "IP",
        "source": str(ipaddress.IPv4Address(data[12:16])),
        "destination": str(ipaddress.IPv4Address(data[16:20])),
        "ttl": ttl,
        "length": length,
    }
    if offset := fragment & 0x1FFF:
        layer["fragment_offset"] = offset * 8
    yield layer
    inner = data[head:length] if head <= length <= len(data) else data[head:]
    yield from _rest(inner) if offset else _transport(protocol, inner)


def _ip6(data: bytes) -> Iterator[Layer]:
    length, following, hops = struct.unpack_from("!xxxxHBB", data)
    yield {
        "layer": "IP6",
        "source": str(ipaddress.IPv6Address(data[8:24])),
        "destination": str(ipaddress.IPv6Address(data[24:40])),
        "hop_limit": hops,
        "length": 40 + length,
    }
    yield from _transport(following, data[40 : 40 + length])


def _transport(protocol: int, data: bytes) -> Iterator[Layer]:
    if protocol == _TCP and len(data) >= 20:
        source, destination, bits = struct.unpack_from("!HHxxxxxxxxxB", data)
        flags = " ".join(name for bit, name in _FLAGS if bits & bit) or "none"
        yield {"layer": "TCP", "source": source, "destination": destination, "flags": flags}
        yield from _rest(data[(data[12] >> 4) * 4 :])
    elif protocol == _UDP and len(data) >= 8:
        source, destination = struct.unpack_from("!HH", data)
        yield {"layer": "UDP", "source": source, "destination": destination}
        yield from _rest(data[8:])
    elif protocol in (_ICMP, _ICMP6) and len(data) >= 8:
        yield {"layer": "ICMP" if protocol == _ICMP else "ICMP6", "type": data[0], "code": data[1]}
        yield from _rest(data[8:])
    elif protocol == _IPIP:
        yield from _network(_IP4, data)
    elif protocol == _IP6IP:
        yield from _network(_IP6, data)
    else:
        yield {"layer": f"protocol {protocol}", "bytes": len(data)}
        yield from _rest(data)
