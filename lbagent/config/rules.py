# SPDX-License-Identifier: Apache-2.0
"""Rules that span several keys, one function each: Config -> where, and what is wrong there."""

import os
import re
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from lbagent.config.sections import Config, Family, parse_range
from lbagent.errors import ConfigError

QUIET_API_S = 180.0
"""Bookmarks come once a minute; two may be missed."""

Location = tuple[str | int, ...]
"""Where a key stands: ``("bgp", "peers", 0, "peer_as")``."""

Problem = tuple[Location, str]


def _unique(items: tuple[Any, ...], where: Location, key: str) -> Iterator[Problem]:
    seen: dict[Hashable, int] = {}
    for index, item in enumerate(items):
        value = getattr(item, key)
        if value in seen:
            yield (*where, index, key), f"{value} is there already, as number {seen[value] + 1}"
        seen.setdefault(value, index)


def _overlaps(config: Config) -> Iterator[Problem]:
    ranges = [
        (parse_range(text), (p, i), f"{pool.name}: {text}")
        for p, pool in enumerate(config.pools)
        for i, text in enumerate(pool.addresses)
    ]
    ranges.sort(key=lambda item: item[0])
    widest_by_family: dict[int, tuple[int, str]] = {}
    for found, (p, i), text in ranges:
        last, taken_by = widest_by_family.get(found.family, (-1, ""))
        if found.first <= last:
            yield ("pools", p, "addresses", i), f"overlaps {taken_by}: an address may be in one range only"
        if found.last > last:
            widest_by_family[found.family] = (found.last, text)


def _undefined_names(config: Config) -> Iterator[Problem]:
    policies = {p.name for p in config.bgp.policies}
    peers = {p.name for p in config.bgp.peers}
    for p, pool in enumerate(config.pools):
        for i, name in enumerate(pool.policies):
            if name not in policies:
                yield ("pools", p, "policies", i), f"{name} is not defined under bgp.policies"
    for p, policy in enumerate(config.bgp.policies):
        for i, name in enumerate(policy.peers):
            if name not in peers:
                yield ("bgp", "policies", p, "peers", i), f"{name} is not defined under bgp.peers"


def _hold_times(config: Config) -> Iterator[Problem]:
    places: list[tuple[Location, int | None]] = [(("bgp",), config.bgp.hold_time_s)]
    places += [(("bgp", "peers", i), peer.hold_time_s) for i, peer in enumerate(config.bgp.peers)]
    for where, value in places:
        if value not in (None, 0) and not 3 <= value <= 65535:
            yield (*where, "hold_time_s"), f"{value} is neither 0 nor 3 to 65535 (RFC 4271, 4.2)"


def _sessions(config: Config) -> Iterator[Problem]:
    for i, peer in enumerate(config.bgp.peers):
        where: Location = ("bgp", "peers", i)
        internal = (peer.local_as or config.bgp.local_as) == peer.peer_as
        if (":" in peer.address) != (":" in peer.local_address):
            yield (*where, "local_address"), "is of another family than address"
        if peer.gtsm and peer.multihop_ttl:
            yield (*where, "gtsm"), "excludes multihop_ttl: GTSM is for direct neighbours"
        if internal and peer.multihop_ttl:
            yield (*where, "multihop_ttl"), "is for eBGP; an iBGP session needs none"
        if peer.passive and not config.bgp.listen:
            yield (*where, "passive"), "needs bgp.listen: true"
        for family in peer.announced_families:
            explicit = peer.next_hop.ipv4 if family is Family.IPV4 else peer.next_hop.ipv6
            if family is Family.IPV6 and peer.family is Family.IPV4 and not explicit:
                yield (
                    (*where, "next_hop", "ipv6"),
                    "is needed: IPv6 routes over an IPv4 session have no next hop of their own",
                )


def _passwords(config: Config) -> Iterator[Problem]:
    for i, peer in enumerate(config.bgp.peers):
        # A bare name is a credential of lbagent-bgp.service, which nobody else can see.
        if peer.password_file and (peer.password_file.is_absolute() or "CREDENTIALS_DIRECTORY" in os.environ):
            try:
                read_password(peer.password_file)
            except ConfigError as error:
                yield ("bgp", "peers", i, "password_file"), error.message


def _timings(config: Config) -> Iterator[Problem]:
    lease, stale_after_s = config.kubernetes.lease, config.kubernetes.stale_after_s
    if 0 < stale_after_s < QUIET_API_S:
        yield (
            ("kubernetes", "stale_after_s"),
            f"{stale_after_s:g} is less than {QUIET_API_S:g}: a quiet API may be silent so long",
        )
    if lease.renew_s * 2 > lease.duration_s:
        yield (
            ("kubernetes", "lease", "renew_s"),
            f"{lease.renew_s:g} is more than half of duration_s {lease.duration_s:g}",
        )
    if config.probe.timeout_s > config.probe.interval_s:
        yield (
            ("probe", "timeout_s"),
            f"{config.probe.timeout_s:g} is longer than interval_s {config.probe.interval_s:g}",
        )


def _modes(config: Config) -> Iterator[Problem]:
    for p, pool in enumerate(config.pools):
        if pool.mode not in config.xdp.modes:
            yield ("pools", p, "mode"), f"{pool.mode.value} is not among xdp.modes"


RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    lambda c: _unique(c.pools, ("pools",), "name"),
    lambda c: _unique(c.bgp.peers, ("bgp", "peers"), "name"),
    lambda c: _unique(c.bgp.peers, ("bgp", "peers"), "address"),
    lambda c: _unique(c.bgp.policies, ("bgp", "policies"), "name"),
    _overlaps,
    _undefined_names,
    _hold_times,
    _sessions,
    _passwords,
    _timings,
    _modes,
)


def read_password(path: Path) -> str:
    """The TCP MD5 key in a file that only its owner (and group) may read. Raises ConfigError."""
    if not path.is_absolute():
        path = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/run/credentials/lbagent-bgp.service")) / path
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot be read: {error}") from error
    if mode & 0o007:
        raise ConfigError(f"{path} may be read by everybody: chmod 0640 {path}")
    if not re.fullmatch(r"[A-Za-z0-9!#$%&()*+,./:<=>?@^_~-]{1,80}", text):
        raise ConfigError(f"{path} must hold 1 to 80 letters, digits or !#$%&()*+,./:<=>?@^_~-")
    return text
