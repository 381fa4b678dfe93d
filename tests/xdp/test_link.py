# SPDX-License-Identifier: Apache-2.0
"""Attachment to real interfaces: what outlives the daemon, what is exchanged, what is refused."""

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbagent.config import Attach
from lbagent.errors import XdpError
from lbagent.xdp import bpf
from lbagent.xdp.bpf import KernelRefused, Map, MapSpec, MapType
from lbagent.xdp.compile import Bytecode
from lbagent.xdp.link import Links, Program, Programs
from tests.lab.netns import Namespace, Port, cable

pytestmark = pytest.mark.netns

SPEC = MapSpec(name="lb_test", type=MapType.ARRAY, key_bytes=4, value_bytes=8, entries=1)


def bytecode(action: int) -> Bytecode:
    """``lb_test`` is named, then ``return action``."""
    code = struct.pack("<BBhiBBhi", 0x18, 0x11, 0, 1, 0, 0, 0, 0)
    code += struct.pack("<BBhi", 0xB7, 0, 0, action) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    return Bytecode(code, ("lb_test",))


PASS, DROP = bytecode(2), bytecode(1)


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A namespace with ``wan`` and ``wan.100`` cabled to ``peer`` and ``peer.100``; the test runs inside."""
    token = os.urandom(3).hex()
    inside, outside = Namespace(f"a2h{token}"), Namespace(f"a2p{token}")
    inside.create()
    outside.create()
    try:
        for suffix in ("", ".100"):
            cable(Port(inside, f"wan{suffix}"), Port(outside, f"peer{suffix}"))
        with inside.entered():
            yield inside
    finally:
        inside.delete()
        outside.delete()


@pytest.fixture
def table() -> Iterator[Map]:
    with Map.create(SPEC) as created:
        yield created


class Room:
    """Programs and links over one folder of pins; ``restart`` is a new daemon."""

    def __init__(self, pins: Path, table: Map) -> None:
        self.pins, self.maps = pins, {"lb_test": table}
        self.start()

    def start(self) -> None:
        self.programs = Programs(self.pins / "programs")
        self.programs.open()
        self.links = Links(self.pins / "links", self.programs)
        self.links.open()

    def stop(self) -> None:
        self.links.close()
        self.programs.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def load(self, code: Bytecode, *, frags: bool = False) -> Program:
        return self.programs.load(code, self.maps, frags=frags)


@pytest.fixture
def room(host: Namespace, pins: Path, table: Map) -> Iterator[Room]:
    made = Room(pins, table)
    yield made
    made.stop()


def shown(host: Namespace, interface: str = "wan") -> str:
    return host.run("ip", "-details", "link", "show", "dev", interface)


def test_an_attached_program_is_what_the_kernel_shows(host: Namespace, room: Room):
    program = room.load(PASS)
    assert room.links.attach("wan", program, Attach.NATIVE)
    attached = room.links.attached()["wan"]
    assert (attached.program_id, attached.mode) == (program.id, Attach.NATIVE)
    assert f"prog/xdp id {program.id}" in shown(host)


def test_attaching_what_runs_already_changes_nothing(room: Room):
    program = room.load(PASS)
    room.links.attach("wan", program, Attach.NATIVE)
    assert not room.links.attach("wan", program, Attach.NATIVE)


def test_the_program_outlives_the_daemon_and_the_next_one_takes_it_over(host: Namespace, room: Room):
    program = room.load(PASS)
    room.links.attach("wan", program, Attach.NATIVE)
    room.stop()
    assert f"prog/xdp id {program.id}" in shown(host)
    room.start()
    assert room.links.attached()["wan"].program_id == program.id
    assert room.load(PASS).id == program.id
    assert not room.links.attach("wan", room.load(PASS), Attach.NATIVE)


def test_other_code_takes_the_place_on_the_same_link(host: Namespace, room: Room):
    room.links.attach("wan", room.load(PASS), Attach.NATIVE)
    room.restart()
    link = Path(room.pins / "links/native/wan")
    before = bpf.link_info(bpf.open_pin(str(link))).id
    new = room.load(DROP)
    assert room.links.attach("wan", new, Attach.NATIVE)
    assert bpf.link_info(bpf.open_pin(str(link))).id == before
    assert f"prog/xdp id {new.id}" in shown(host)
    room.programs.forget_all_but(new)
    assert [path.name for path in (room.pins / "programs").iterdir()] == [new.name]


def test_the_same_code_over_new_maps_is_another_program(room: Room):
    old = room.load(PASS)
    room.links.attach("wan", old, Attach.NATIVE)
    with Map.create(SPEC) as fresh:
        room.maps = {"lb_test": fresh}
        new = room.load(PASS)
        assert new.name == old.name
        assert new.id != old.id
        assert room.links.attach("wan", new, Attach.NATIVE)
        room.programs.forget_all_but(new)
        room.restart()
        assert room.links.attached()["wan"].program_id == new.id


def test_an_exchange_that_was_interrupted_is_finished_by_the_next_daemon(room: Room):
    room.links.attach("wan", room.load(PASS), Attach.NATIVE)
    room.links.attach("wan.100", room.load(PASS), Attach.NATIVE)
    new = room.load(DROP)
    room.links.attach("wan", new, Attach.NATIVE)
    room.restart()
    for interface in ("wan", "wan.100"):
        room.links.attach(interface, room.load(DROP), Attach.NATIVE)
    assert {a.program_id for a in room.links.attached().values()} == {new.id}


def test_a_foreign_link_is_refused_and_left_alone(host: Namespace, room: Room, table: Map, pins: Path):
    foreign = Room(pins / "foreign", table)
    theirs = foreign.load(DROP)
    foreign.links.attach("wan", theirs, Attach.NATIVE)
    with pytest.raises(XdpError, match="wan runs an XDP program that is not ours"):
        room.links.attach("wan", room.load(PASS), Attach.NATIVE)
    assert f"prog/xdp id {theirs.id}" in shown(host)
    foreign.stop()


@pytest.mark.parametrize("mode", ["xdpdrv", "xdpgeneric"])
def test_a_program_that_ip_attached_is_refused_and_left_alone(host: Namespace, room: Room, pins: Path, mode: str):
    theirs = room.load(DROP)
    host.run("ip", "link", "set", "dev", "wan", mode, "pinned", str(pins / "programs" / theirs.name))
    with pytest.raises(XdpError, match="not ours"):
        room.links.attach("wan", room.load(PASS), Attach.NATIVE)
    assert f"id {theirs.id}" in shown(host)


def test_ip_link_cannot_take_our_program_off(host: Namespace, room: Room):
    program = room.load(PASS)
    room.links.attach("wan", program, Attach.NATIVE)
    with pytest.raises(Exception, match="ip link set"):
        host.run("ip", "link", "set", "dev", "wan", "xdp", "off")
    assert f"prog/xdp id {program.id}" in shown(host)


def test_an_interface_that_is_not_there_is_named(room: Room):
    with pytest.raises(XdpError, match="there is no interface wan7"):
        room.links.attach("wan7", room.load(PASS), Attach.NATIVE)


def test_a_driver_without_native_xdp_is_refused_rather_than_served_slowly(room: Room):
    with pytest.raises(KernelRefused, match="the driver of lo has no native XDP") as refused:
        room.links.attach("lo", room.load(PASS), Attach.NATIVE)
    assert refused.value.errno == errno.EOPNOTSUPP
    assert room.links.attached() == {}


def test_generic_mode_is_given_to_who_asks_for_it(host: Namespace, room: Room):
    room.links.attach("lo", room.load(PASS), Attach.GENERIC)
    assert room.links.attached()["lo"].mode is Attach.GENERIC
    assert "xdpgeneric" in shown(host, "lo")


def test_a_change_of_mode_survives_a_restart(host: Namespace, room: Room):
    room.links.attach("wan", room.load(PASS), Attach.GENERIC)
    room.restart()
    room.links.attach("wan", room.load(PASS), Attach.NATIVE)
    room.restart()
    assert room.links.attached()["wan"].mode is Attach.NATIVE
    assert "xdpgeneric" not in shown(host)


def test_an_interface_that_was_made_anew_is_attached_anew(host: Namespace, room: Room):
    room.links.attach("wan", room.load(PASS), Attach.NATIVE)
    host.ip("link delete wan", "link add wan type veth peer name other")
    assert room.links.attached() == {}
    program = room.load(PASS)
    assert room.links.attach("wan", program, Attach.NATIVE)
    assert room.links.attached()["wan"].program_id == program.id


def test_a_link_whose_interface_went_while_nobody_looked_is_dropped(host: Namespace, room: Room):
    room.links.attach("wan", room.load(PASS), Attach.NATIVE)
    room.stop()
    host.ip("link delete wan")
    room.start()
    assert room.links.interfaces() == frozenset()
    assert list((room.pins / "links/native").iterdir()) == []


def test_a_name_with_a_dot_is_pinned_too(room: Room):
    room.links.attach("wan.100", room.load(PASS), Attach.NATIVE)
    room.restart()
    assert room.links.interfaces() == {"wan.100"}


def test_detaching_leaves_nothing(host: Namespace, room: Room):
    room.links.attach("wan", room.load(PASS), Attach.NATIVE)
    room.links.detach("wan")
    assert "prog/xdp" not in shown(host)
    assert list((room.pins / "links/native").iterdir()) == []


def test_jumbo_frames_need_the_program_with_fragments(host: Namespace, room: Room):
    host.ip("link delete wan", "link add wan mtu 9000 type veth peer name other mtu 9000")
    with pytest.raises(XdpError, match="3506"):
        room.links.attach("wan", room.load(PASS), Attach.NATIVE)
    assert room.links.attach("wan", room.load(PASS, frags=True), Attach.NATIVE)


def test_pins_outside_bpffs_are_refused_with_the_remedy(tmp_path: Path, table: Map):
    programs = Programs(tmp_path / "programs")
    programs.open()
    with pytest.raises(XdpError, match="mount -t bpf"):
        programs.load(PASS, {"lb_test": table}, frags=False)
