# SPDX-License-Identifier: Apache-2.0
"""A status that has just turned to ipMode VIP is old news to us and fresh news to the nodes.

kube-proxy takes packets for a VIP up to a second after the status says so (its minimum sync period,
measured); whoever sends them earlier sees them loop or refused. So for a little while the planner is
shown ``Proxy`` and goes on in mode nat, which works whatever the status says.
"""

from collections.abc import Mapping
from dataclasses import replace

from lbagent.model.service import IpMode, Service, ServiceKey

NODES_FOLLOW_S = 3.0


class News:
    """``services`` as they may be believed now; ``turns``: when that changes by time alone, 0: never.

    What stood there at the first look is believed at once: the nodes have known it for long.
    """

    def __init__(self) -> None:
        self.turns = 0.0
        self._since_by_service: dict[ServiceKey, float] | None = None
        self._shown_by_service: dict[ServiceKey, tuple[Service, Service]] = {}

    def services(self, services: Mapping[ServiceKey, Service], now: float) -> dict[ServiceKey, Service]:
        """The same Services, those with fresh news as they were told before. ``now``: monotonic seconds."""
        known = self._since_by_service
        since_by_service: dict[ServiceKey, float] = {}
        shown_by_service: dict[ServiceKey, tuple[Service, Service]] = {}
        shown = dict(services)
        turns = 0.0
        for key, service in services.items():
            if not any(ingress.ip_mode is IpMode.VIP for ingress in service.ingress):
                continue
            since = float("-inf") if known is None else known.get(key, now)
            since_by_service[key] = since
            if now - since < NODES_FOLLOW_S:
                before = self._shown_by_service.get(key)
                # The very same object as long as the Service is: the planner goes by identity.
                older = before[1] if before is not None and before[0] is service else _as_before(service)
                shown_by_service[key] = (service, older)
                shown[key] = older
                turns = min(turns or since + NODES_FOLLOW_S, since + NODES_FOLLOW_S)
        self._since_by_service, self._shown_by_service, self.turns = since_by_service, shown_by_service, turns
        return shown


def _as_before(service: Service) -> Service:
    ingress = tuple(replace(i, ip_mode=IpMode.PROXY) if i.ip_mode is IpMode.VIP else i for i in service.ingress)
    return replace(service, ingress=ingress)
