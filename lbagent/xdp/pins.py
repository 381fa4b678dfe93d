# SPDX-License-Identifier: Apache-2.0
"""The maps as they lie on bpffs: made once, taken over by every later daemon, moved when they grow.

    <bpf>/v<layout>-<digest>/<map>

The digest is of the specs, so other limits are another folder. Which folder is *live* is not
written anywhere: it is the one whose maps the attached program uses. A daemon that wants other maps
fills them from the live ones, changes the program, and only then removes what nobody uses: killed
at any moment, the next one finds a live folder and begins again.
"""

import hashlib
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from lbagent import log
from lbagent.errors import XdpError
from lbagent.xdp import bpf, codec
from lbagent.xdp.bpf import Map, MapSpec, MapType
from lbagent.xdp.index import Index

_LOG = log.get("xdp")
_STARTS_ANEW = {"lb_flows", "lb_nat", "lb_counters", "lb_fragments", "lb_limits"}
"""The place of an entry follows from the size of the map: another size, another place."""


def folder_of(root: Path, specs: Sequence[MapSpec]) -> Path:
    """Where maps of these specs are pinned."""
    return root / f"v{codec.LAYOUT}-{hashlib.sha256(repr(specs).encode()).hexdigest()[:8]}"


def make_folder(folder: Path) -> None:
    """On bpffs, or an XdpError that says how to get one."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise XdpError(
            f"cannot make {folder}: {error.strerror}", hint="mount bpffs there: mount -t bpf bpf /sys/fs/bpf"
        ) from error


def open_maps(root: Path, specs: Sequence[MapSpec], live_ids: Collection[int]) -> dict[str, Map]:
    """The maps by name: those pinned, else new ones filled from the live folder.

    ``live_ids``: maps that an attached program uses.
    """
    folder = folder_of(root, specs)
    live = _live_folder(root, live_ids)
    if live not in (None, folder):
        shutil.rmtree(folder, ignore_errors=True)  # begun by a daemon that did not finish
    if any(not path.name.startswith(f"v{codec.LAYOUT}-") for path in _map_folders(root)):
        _LOG.warning("maps of another layout left behind: VIPs and flows start anew", now=str(folder))
    make_folder(folder)
    before = _open_folder(live) if live not in (None, folder) else {}
    present = _open_folder(folder)
    maps: dict[str, Map] = {}
    backends = next((spec.entries for spec in specs if spec.name == "lb_backends"), 0)
    for spec in specs:
        held = present.pop(spec.name, None)
        if held is not None and held.spec == spec:
            maps[spec.name] = held
            continue
        if held is not None:
            held.close()
            (folder / spec.name).unlink()
        maps[spec.name] = _inherit(spec, before, backends)
        bpf.pin(maps[spec.name].fd, str(folder / spec.name))
    for unused in (*present.values(), *(m for m in before.values() if m not in maps.values())):
        unused.close()
    if before:
        _LOG.warning("maps changed size", before=str(live), now=str(folder))
    return maps


def pin_again(root: Path, specs: Sequence[MapSpec], maps: Mapping[str, Map]) -> tuple[str, ...]:
    """Make the pins that somebody removed -> their maps. Without them the next daemon would begin with empty maps."""
    folder = folder_of(root, specs)
    make_folder(folder)
    missing = tuple(name for name in maps if not (folder / name).exists())
    for name in missing:
        bpf.pin(maps[name].fd, str(folder / name))
    return missing


def forget_all_but(root: Path, specs: Sequence[MapSpec]) -> None:
    """Unpin every other folder of maps: nobody uses them any more."""
    for folder in _map_folders(root):
        if folder != folder_of(root, specs):
            shutil.rmtree(folder, ignore_errors=True)


def _map_folders(root: Path) -> Iterable[Path]:
    return sorted(path for path in root.glob("v*-*") if path.is_dir())


def _live_folder(root: Path, live_ids: Collection[int]) -> Path | None:
    """The folder whose maps are in use. One of another layout version does not count: unreadable."""
    for folder in _map_folders(root):
        maps = _open_folder(folder)
        try:
            if folder.name.startswith(f"v{codec.LAYOUT}-") and any(m.id in live_ids for m in maps.values()):
                return folder
        finally:
            for opened in maps.values():
                opened.close()
    return None


def _open_folder(folder: Path | None) -> dict[str, Map]:
    return {path.name: Map.open(str(path)) for path in folder.iterdir()} if folder is not None else {}


def _inherit(spec: MapSpec, before: Mapping[str, Map], backends: int) -> Map:
    """The live map itself when it fits, else a new one with its content. ``backends``: entries of lb_backends."""
    old = before.get(spec.name)
    if old is None:
        return Map.create(spec)
    if old.spec == spec:
        return old
    new = Map.create(spec)
    if spec.name in _STARTS_ANEW:
        _LOG.warning("table starts anew", map=spec.name, before=old.spec.entries, now=spec.entries)
    elif spec.name == "lb_rings":
        _copy_rings(old, new, before["lb_backends"].spec.entries, backends)
    elif spec.name == "lb_index":
        _copy_index(old, new)
    elif spec.type is MapType.ARRAY:
        _copy_array(old, new)
    else:
        entries = list(old.items())[: spec.entries]
        new.update_all(b"".join(key for key, _ in entries), b"".join(value for _, value in entries))
    return new


def _copy_array(old: Map, new: Map) -> None:
    size = min(old.spec.entries, new.spec.entries) * new.stride
    with old.map_memory() as source, new.map_memory() as target:
        target[:size] = source[:size]


def _copy_index(old: Map, new: Map) -> None:
    """An entry's place follows from the size of the table."""
    with old.map_memory() as source, new.map_memory() as target:
        before, now = (Index(memoryview(memory).cast("Q")) for memory in (source, target))
        now.take_over(before)
        before.close()
        now.close()


def _copy_rings(old: Map, new: Map, old_backends: int, new_backends: int) -> None:
    """Ring by ring: how long one is follows from how many backends there may be."""
    slots = (1 + codec.SLOT_LINES) * codec.LINE
    members_before, members_now = (codec.member_lines(n) * codec.LINE for n in (old_backends, new_backends))
    ring_before, ring_now = slots + 2 * members_before, slots + 2 * members_now
    rings = min(old.spec.entries * codec.LINE // ring_before, new.spec.entries * codec.LINE // ring_now)
    with old.map_memory() as source, new.map_memory() as target:
        for number in range(rings):
            start, to = number * ring_before, number * ring_now
            target[to : to + slots] = source[start : start + slots]
            for part in (0, 1):
                at, put = start + slots + part * members_before, to + slots + part * members_now
                members = source[at : at + members_before][:members_now]
                target[put : put + members_now] = members.ljust(members_now, b"\0")
