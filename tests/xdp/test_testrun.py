# SPDX-License-Identifier: Apache-2.0
import struct

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from lbagent.errors import XdpError
from lbagent.model.service import Protocol
from lbagent.model.vip import Vip
from lbagent.xdp.bpf import load_program
from lbagent.xdp.testrun import kernel_hz, packet_to, trial

SOURCE = {4: "198.51.100.7", 6: "2001:db8:c::7"}
ADDRESS = {4: "192.0.2.1", 6: "2001:db8::1"}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("protocol", "layer"), [(Protocol.TCP, TCP), (Protocol.UDP, UDP)])
def test_a_packet_to_a_vip_is_sound(family: int, protocol: Protocol, layer: type) -> None:
    """Scapy builds the same one, checksums included."""
    vip = Vip(address=ADDRESS[family], protocol=protocol, port=443)
    made = packet_to(vip, source=SOURCE[family])
    seen = Ether(made)
    ip = seen[IP if family == 4 else IPv6]
    assert (ip.src, ip.dst) == (SOURCE[family], ADDRESS[family])
    assert (seen[layer].sport, seen[layer].dport) == (40000, 443)
    fresh = seen.copy()
    if family == 4:
        del fresh[IP].chksum
    del fresh[layer].chksum
    assert bytes(fresh) == made
    assert len(made) >= 60


@pytest.mark.bpf
def test_the_kernels_hz_is_one_that_kernels_have() -> None:
    assert kernel_hz() in (100, 250, 300, 1000)


@pytest.mark.bpf
def test_a_program_that_is_not_ours_is_told_from_ours() -> None:
    returns = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0x00FF_FF03, 0x95, 0, 0, 0)
    program = load_program(returns, name="foreign")
    with pytest.raises(XdpError, match="not ours"):
        trial(program, bytes(64))
