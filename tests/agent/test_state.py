# SPDX-License-Identifier: Apache-2.0
"""The last Snapshot on disk: what is written comes back, what is broken is said."""

from pathlib import Path

import pytest

from lbagent.agent import state
from lbagent.errors import ControlError
from lbagent.model.pool import AddressRange, LabelSelector, Pool, Reservation
from lbagent.model.service import (
    Condition,
    Endpoint,
    Ingress,
    IpMode,
    Node,
    NodeAddress,
    Port,
    Protocol,
    Service,
    ServiceKey,
)
from lbagent.model.state import ProbeTarget, Pulse, Settings, Snapshot
from lbagent.model.vip import Mode, Vip

WEB = ServiceKey("default", "web")

FULL = Snapshot(
    now=12.5,
    wall=1.7e9,
    host="lb1",
    listed=True,
    settings=Settings(
        pools=(
            Pool(
                name="p",
                ranges=(AddressRange(4, 1, 9), AddressRange(6, 1 << 100, 1 << 101)),
                mode=Mode.DSR_L2,
                service_selectors=(LabelSelector(labels=(("a", "b"),), expressions=(("k", "In", ("x", "y")),)),),
            ),
        ),
        namespace_quota={"default": 3},
    ),
    services={
        WEB: Service(
            key=WEB,
            ports=(Port(name="http", protocol=Protocol.TCP, port=80, node_port=30080),),
            ingress=(Ingress(ip="192.0.2.1", ip_mode=IpMode.PROXY),),
            labels={"app": "web"},
            conditions=(Condition(type="X", status="True"),),
        )
    },
    endpoints={WEB: (Endpoint(address="10.244.1.2", node="node1"),)},
    nodes={"node1": Node(name="node1", addresses=(NodeAddress("InternalIP", "10.0.2.1"),), taints=("t",))},
    health={ProbeTarget("10.0.2.1", "tcp", 30080): Pulse(up=True, since=3.0)},
    unreachable=frozenset({"10.0.2.9"}),
    unproven={Vip(address="192.0.2.1", protocol=Protocol.TCP, port=80): "no ring"},
    reservations={"192.0.2.7": Reservation(address="192.0.2.7", service=WEB, released=5.0)},
)


def test_a_snapshot_comes_back_equal() -> None:
    assert state.parse(state.dump(FULL)) == FULL


def test_the_text_is_stable() -> None:
    assert state.dump(FULL) == state.dump(state.parse(state.dump(FULL)))


def test_a_saved_snapshot_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.json"
    state.save(path, FULL)
    assert state.load(path) == FULL
    assert [p.name for p in tmp_path.iterdir()] == ["snapshot.json"]
    assert path.stat().st_mode & 0o007 == 0


def test_no_file_is_no_snapshot(tmp_path: Path) -> None:
    assert state.load(tmp_path / "nosuch") is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format":"x"}', f'{{"format":"{state.FORMAT}","snapshot":{{"services":5}}}}']
)
def test_a_broken_file_is_an_error_not_a_crash(tmp_path: Path, text: str) -> None:
    path = tmp_path / "snapshot.json"
    path.write_text(text)
    with pytest.raises(ControlError):
        state.load(path)


def test_an_unknown_field_of_a_later_version_is_passed_over() -> None:
    text = state.dump(FULL).replace('"host":"lb1"', '"host":"lb1","invented_later":1')
    assert state.parse(text) == FULL


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="cannot keep the last snapshot"):
        state.save(tmp_path / "nosuch" / "snapshot.json", FULL)
