# SPDX-License-Identifier: Apache-2.0
"""What happened to a packet: the Python twin of ``ebpf/verdict.h`` (a test compares them).

The same word is printed by lbctl, metrics, logs and docs. The order is the meaning: up to
``LAST_PASS`` the kernel got the packet, up to ``LAST_FORWARD`` it went on, up to ``LAST_ANSWER`` we
replied to its sender, the others were dropped.
"""

from enum import IntEnum


class Verdict(IntEnum):
    """``value`` is the kernel's number, ``word`` what is printed, ``sentence`` says it in words."""

    sentence: str

    def __new__(cls, number: int, sentence: str) -> "Verdict":
        self = int.__new__(cls, number)
        self._value_ = number
        self.sentence = sentence
        return self

    NOT_IP = (0, "neither IPv4 nor IPv6: left to the kernel")
    NOT_OURS = (1, "not addressed to anything we serve: left to the kernel")
    NO_SLOT = (2, "to a SNAT address, but part of no connection of ours: left to the kernel")

    NAT_FORWARD = (3, "rewritten to the node port of a backend")
    NAT_REPLY = (4, "a backend's reply, rewritten and returned to the client")
    DSR_L2 = (5, "sent to the MAC address of a backend, otherwise unchanged")
    DSR_IPIP = (6, "sent to a backend through a tunnel, otherwise unchanged")
    FRAGMENT_FORWARD = (7, "a fragment, sent where its first fragment went")
    ICMP_TO_BACKEND = (8, "an ICMP error, sent to the backend of the flow it quotes")
    ICMP_TO_CLIENT = (9, "an ICMP error about a reply, sent to the client")

    ECHO_ANSWERED = (10, "a ping, answered")
    PORT_REFUSED = (11, "to a port the VIP does not serve: answered with a reset or port unreachable")
    NO_FLOW_RESET = (12, "in the middle of a TCP connection we do not know: answered with a reset")
    TOO_BIG_ANSWERED = (13, "too long for the way to the backend: the client was told the MTU")
    TTL_ANSWERED = (14, "its TTL ended here: the sender was told")

    MALFORMED = (15, "dropped: its headers do not fit or contradict one another")
    IP_OPTIONS = (16, "dropped: IPv4 options, by policy")
    EXTENSION_HEADER = (17, "dropped: an IPv6 extension header, by policy")
    PROTOCOL = (18, "dropped: to a VIP, but neither TCP nor UDP nor ICMP we know")
    NO_PORT = (19, "dropped: to a port the VIP does not serve")
    SOURCE_DENIED = (20, "dropped: its source is not in loadBalancerSourceRanges")
    NEW_FLOW_LIMIT = (21, "dropped: its source opens more new flows than it may")
    NO_BACKEND = (22, "dropped: the VIP has no active backend")
    NO_NEXTHOP = (23, "dropped: no resolved next hop to the backend, or back to the client")
    NO_FLOW = (24, "dropped: in the middle of a TCP connection we do not know")
    NAT_FULL = (25, "dropped: no SNAT port is free for a new flow")
    TTL_EXPIRED = (26, "dropped: its TTL ended here")
    TOO_BIG = (27, "dropped: too long for the way to the backend")
    FRAGMENT_LOST = (28, "dropped: a fragment whose first fragment we have not seen")
    ICMP_UNMATCHED = (29, "dropped: an ICMP message to a VIP that quotes no flow of ours")
    ICMP_LIMIT = (30, "dropped: an answer would exceed the limit of answers")
    NO_HEADROOM = (31, "dropped: the driver leaves no room for the header to add")

    @property
    def word(self) -> str:
        return self.name.lower()

    @property
    def is_drop(self) -> bool:
        return self > LAST_ANSWER

    @property
    def is_forward(self) -> bool:
        return LAST_PASS < self <= LAST_FORWARD


LAST_PASS = Verdict.NO_SLOT
LAST_FORWARD = Verdict.ICMP_TO_CLIENT
LAST_ANSWER = Verdict.TTL_ANSWERED

BY_NUMBER: dict[int, Verdict] = {int(verdict): verdict for verdict in Verdict}
"""As the kernel numbers them."""
