# SPDX-License-Identifier: Apache-2.0
"""What the world remembers between two snapshots, and for how long."""

from dataclasses import replace

from lbagent.model.pool import Reservation
from lbagent.model.vip import BackendState
from tests.agent.machine import WEB, Machine, one_service


def test_a_deleted_node_drains_before_it_is_gone() -> None:
    cluster = one_service()
    machine = Machine(cluster)
    machine.world.snapshot()
    gone = cluster.nodes.pop("node1")
    machine.now += 1
    snapshot = machine.world.snapshot()
    assert snapshot.nodes["node1"] == replace(gone, deleting=True)
    assert snapshot.leaving == {"node1": machine.now + 30}
    machine.now += 30
    snapshot = machine.world.snapshot()
    assert "node1" not in snapshot.nodes
    assert snapshot.leaving == {}


def test_an_excluded_node_drains_and_one_that_comes_back_serves_again() -> None:
    cluster = one_service()
    machine = Machine(cluster)
    machine.world.snapshot()
    label = {"node.kubernetes.io/exclude-from-external-load-balancers": ""}
    cluster.nodes["node1"] = replace(cluster.nodes["node1"], labels=label)
    assert "node1" in machine.world.snapshot().leaving
    cluster.nodes["node1"] = replace(cluster.nodes["node1"], labels={})
    assert machine.world.snapshot().leaving == {}


async def test_the_backend_of_a_leaving_node_keeps_its_flows_and_gets_no_new_ones() -> None:
    cluster = one_service()
    machine = Machine(cluster)
    await machine.settle()
    cluster.nodes["node2"] = replace(
        cluster.nodes["node1"],
        name="node2",
        addresses=(replace(cluster.nodes["node1"].addresses[0], address="10.0.2.2"),),
    )
    del cluster.nodes["node1"]
    last = await machine.settle()
    (ring,) = last.desired.rings.values()
    assert {b.node: b.state for b in ring.backends} == {"node1": BackendState.DRAINING, "node2": BackendState.ACTIVE}


def test_host_names_are_not_tracked_as_addresses() -> None:
    cluster = one_service()
    node = cluster.nodes["node1"]
    cluster.nodes["node1"] = replace(
        node, addresses=(*node.addresses, replace(node.addresses[0], type="Hostname", address="node1"))
    )
    machine = Machine(cluster)
    machine.world.snapshot()
    assert machine.kernel.tracked == {"10.0.2.1"}


def test_a_clock_that_was_set_back_keeps_no_address_for_ever() -> None:
    cluster = one_service()
    machine = Machine(cluster)
    machine.world.snapshot()
    later = Reservation(address="192.0.2.9", service=WEB, released=machine.now + 3600)
    machine.world._reservations["192.0.2.9"] = later
    assert "192.0.2.9" not in machine.world.snapshot().reservations
