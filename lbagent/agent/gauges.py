# SPDX-License-Identifier: Apache-2.0
"""Bring the gauges up to date before a scrape; what is counted as it happens is counted elsewhere."""

from lbagent.agent import views
from lbagent.agent.loop import Pass
from lbagent.agent.targets import Cluster, Count, Kernel, Speaker
from lbagent.metrics import Metrics, Traffic
from lbagent.model.route import SessionState
from lbagent.model.vip import BackendState


def refresh(
    metrics: Metrics, *, last: Pass | None, kernel: Kernel, speaker: Speaker, cluster: Cluster, now: float
) -> None:
    """All that others own: the kernel's counters, BGP sessions, the decisions of the last Pass."""
    told = speaker.observed()
    metrics.speaker(connected=told.connected, restarts=told.restarts)
    peers = told.peers.values()
    metrics.peers(
        up={p.name: p.session is SessionState.UP for p in peers},
        flaps={p.name: p.flaps for p in peers},
        announced={p.name: p.sent for p in peers},
    )
    metrics.state_age(cluster.age_s)
    metrics.leader(is_leader=cluster.holds_lease(now))
    tally = kernel.counters()
    metrics.verdicts({verdict.word: _traffic(count) for verdict, count in tally.verdicts.items()})
    metrics.vips({str(vip): _traffic(count) for vip, count in tally.vips.items()})
    metrics.backends({address: _traffic(count) for address, count in tally.backends.items()})
    if last is not None:
        _decided(metrics, last)


def _decided(metrics: Metrics, last: Pass) -> None:
    metrics.services(views.counts(last))
    metrics.attached(last.kernel.attached)
    metrics.programmed(vips=len(last.kernel.forwards), proven=len(last.observed.proven))
    pools = views.pools(last)
    metrics.pools(
        assigned={p["pool"]: p["assigned"] for p in pools}, capacity={p["pool"]: p["addresses"] for p in pools}
    )
    fingerprint = 0
    for ring in last.desired.rings:
        fingerprint ^= int(ring, 16)
    metrics.rings(fingerprint)
    backends_by_ring = {name: ring.backends for name, ring in last.desired.rings.items()}
    metrics.backends_up(
        {
            (str(forward.service), backend.address): backend.state is BackendState.ACTIVE
            for forward in last.desired.forwards.values()
            for backend in backends_by_ring[forward.ring]
        }
    )


def _traffic(count: Count) -> Traffic:
    return Traffic(packets=count.packets, bytes=count.bytes)
