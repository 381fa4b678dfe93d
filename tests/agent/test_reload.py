# SPDX-License-Identifier: Apache-2.0
"""What a reload would change is said first, and addresses are not taken silently."""

from dataclasses import replace

import pytest

from lbagent.agent import reload
from lbagent.config import parse
from lbagent.errors import ConfigError
from lbagent.model.service import Ingress
from lbagent.model.state import Snapshot
from tests.agent.machine import WEB, one_service
from tests.config.example import GOOD

CURRENT = parse(GOOD)


def snapshot() -> Snapshot:
    cluster = one_service()
    held = replace(cluster.services[WEB], ingress=(Ingress(ip="203.0.113.1"),))
    return Snapshot(
        now=0.0,
        listed=True,
        settings=CURRENT.settings(),
        services={WEB: held},
        endpoints=cluster.endpoints,
        nodes=cluster.nodes,
    )


def test_the_same_file_changes_nothing() -> None:
    change = reload.compare(CURRENT, parse(GOOD), snapshot())
    assert change.words() == []
    reload.permit(change)


def test_a_pool_that_shrinks_says_who_loses_and_is_refused() -> None:
    change = reload.compare(CURRENT, parse(GOOD.replace("203.0.113.0/28, ", "")), snapshot())
    assert change.renumbered == {"default/web": ("203.0.113.1",)}
    assert "default/web loses 203.0.113.1" in change.words()
    with pytest.raises(ConfigError, match="would take addresses from 1 Services"):
        reload.permit(change)


def test_renumbering_can_be_allowed() -> None:
    text = GOOD.replace("203.0.113.0/28, ", "") + "allow_renumber: true\n"
    reload.permit(reload.compare(CURRENT, parse(text), snapshot()))


def test_what_needs_a_restart_is_named() -> None:
    change = reload.compare(CURRENT, parse(GOOD.replace("[eth0]", "[eth0, eth1]") + "cool_down_s: 5\n"), snapshot())
    assert change.needs_restart == ("xdp",)
    assert change.words() == ["cool_down_s: taken over", "xdp: needs systemctl restart lbagent"]


def test_a_changed_peer_tells_to_reload_the_speaker() -> None:
    change = reload.compare(CURRENT, parse(GOOD.replace("peer_as: 65101", "peer_as: 65102")), None)
    assert change.words() == ["bgp: taken over", "bgp: sessions change with systemctl reload lbagent-bgp"]
