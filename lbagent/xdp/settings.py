# SPDX-License-Identifier: Apache-2.0
"""How the data path behaves: addresses, policies and times, as lb_config holds them (struct config)."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

from lbagent.xdp import codec


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the data path needs of the configuration; times in seconds.

    ``snat_addresses`` of both families, in an order that does not change; ``port_first`` and
    ``port_count`` are the SNAT ports of each. ``tunnel4`` and ``tunnel6``: outer source of
    dsr-ipip, whose last ``*_vary_bits`` bits are filled from the flow. ``timeouts_s`` by NAT state
    (see ``NatState``); ``pressure_s`` the same when no other slot is free.
    """

    snat_addresses: tuple[str, ...] = ()
    port_first: int = 1024
    port_count: int = 64512
    seed: int = 0x6C626167656E7431
    no_port: str = "answer"
    options: str = "drop"
    echo: str = "answer"
    tunnel4: str = "0.0.0.0"
    tunnel4_vary_bits: int = 0
    tunnel6: str = "::"
    tunnel6_vary_bits: int = 0
    answers_per_s: int = 1000
    udp_idle_s: float = 60.0
    timeouts_s: Mapping[str, float] = field(default_factory=dict)
    pressure_s: Mapping[str, float] = field(default_factory=dict)


NAT_STATES = (
    "free",
    "claimed",
    "syn",
    "syn_ack",
    "established",
    "fin_client",
    "fin_backend",
    "closed",
    "udp",
    "udp_stream",
)
"""enum nat_state of layout.h."""

_TIMEOUT_S = {  # RFC 5382: established at least 2 h 4 min, transitory 4 min; RFC 4787: UDP 2 min
    "claimed": 5.0,
    "syn": 10.0,
    "syn_ack": 30.0,
    "established": 7440.0,
    "fin_client": 240.0,
    "fin_backend": 240.0,
    "closed": 60.0,
    "udp": 30.0,
    "udp_stream": 120.0,
}
_PRESSURE_S = {"syn": 3.0, "syn_ack": 5.0, "closed": 1.0, "udp": 5.0}
_POLICY = {"drop": 0, "answer": 1, "pass": 2}


def settings_bytes(settings: Settings, tick_s: float) -> bytes:
    """A struct config."""
    timeout = {**_TIMEOUT_S, **settings.timeouts_s}
    pressure = {**timeout, **_PRESSURE_S, **settings.pressure_s}

    def by_state(seconds: Mapping[str, float]) -> list[int]:
        ticks = [round(seconds.get(state, 0) / tick_s) for state in NAT_STATES]
        return ticks + [0] * (codec.NAT_STATES - len(ticks))

    families = [ipaddress.ip_address(a).version for a in settings.snat_addresses]
    snats4 = families.count(4)
    vary4 = ((1 << settings.tunnel4_vary_bits) - 1).to_bytes(4, "big")
    vary6 = ((1 << settings.tunnel6_vary_bits) - 1).to_bytes(4, "big")
    return codec.CONFIG.pack(
        settings.seed,
        0,
        snats4,
        snats4,
        len(families) - snats4,
        settings.port_first,
        settings.port_count // codec.NAT_WAYS,
        _POLICY[settings.no_port],
        _POLICY[settings.options],
        _POLICY[settings.echo],
        ipaddress.ip_address(settings.tunnel4).packed,
        vary4,
        ipaddress.ip_address(settings.tunnel6).packed,
        vary6,
        max(1, round(settings.answers_per_s * tick_s)),
        max(1, round(settings.udp_idle_s / tick_s)),
        0,
        *by_state(timeout),
        *by_state(pressure),
    )
