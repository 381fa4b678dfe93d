# SPDX-License-Identifier: Apache-2.0
"""A machine that boots a real systemd: the host's own distribution in a systemd-nspawn container.

The image is made once by debootstrap and kept in the cache folder; each machine writes to memory
only, so nothing of it is left when it is off. Its network is a namespace with the two interfaces
of an LB host and no way out.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lbagent" / "deploy"
PACKAGES = ("systemd", "systemd-sysv", "dbus", "iproute2", "ethtool", "procps", "acl", "python3", "python3-venv")
PACKAGES += ("python3-apt", "python3-bpfcc", "linux-headers-")  # Ansible's apt module; ours
ADDRESSES = {"eth0": "10.0.1.1/24", "eth1": "10.0.2.11/24"}

BPFFS_UNIT = """
[Unit]
Description=bpffs, which systemd mounts by itself where it is not in a container
DefaultDependencies=no
Before=systemd-tmpfiles-setup.service sysinit.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=mount -t bpf -o mode=700 bpf /sys/fs/bpf
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    return done.stdout


def image() -> Path:
    """The root file system that machines boot from, made when it is not there."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    suite, distribution = (release[key].strip('"') for key in ("VERSION_CODENAME", "ID"))
    headers = "generic" if distribution == "ubuntu" else run("dpkg", "--print-architecture").strip()
    packages = ",".join(PACKAGES) + headers
    key = hashlib.sha256(f"{suite} {packages} {BPFFS_UNIT}".encode()).hexdigest()[:12]
    root = CACHE / f"{suite}-{key}"
    if root.exists():
        return root
    CACHE.mkdir(parents=True, exist_ok=True)
    fresh = CACHE / f".{suite}-{secrets.token_hex(4)}"
    try:
        run("debootstrap", "--variant=minbase", f"--include={packages}", suite, fresh, _mirror(suite))
        _prepare(fresh)
        fresh.rename(root)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return root


def _mirror(suite: str) -> str:
    """The archive this host takes the suite from."""
    targets = run("apt-get", "indextargets", "--format", "$(RELEASE) $(CODENAME) $(SITE)", "Created-By: Packages")
    return next(line.split()[2] for line in targets.splitlines() if suite in line.split()[:2])


def _prepare(root: Path) -> None:
    units = root / "etc/systemd/system"
    (units / "bpffs.service").write_text(BPFFS_UNIT)
    (units / "sysinit.target.wants").mkdir(exist_ok=True)
    (units / "sysinit.target.wants/bpffs.service").symlink_to("../bpffs.service")
    (units / "systemd-firstboot.service").symlink_to("/dev/null")
    (root / "etc/machine-id").write_text("")
    # A real host has the headers of its kernel; this one shares ours.
    modules = root / "lib/modules"
    installed = max(folder for folder in modules.iterdir() if (folder / "build").is_symlink())
    ours = modules / os.uname().release
    ours.mkdir(exist_ok=True)
    for name in ("build", "source"):
        link = installed / name
        if link.is_symlink() and not (ours / name).is_symlink():
            (ours / name).symlink_to(os.readlink(link))


def wheelhouse(out: Path) -> None:
    """All wheels of a release, as ``make wheelhouse`` brings them together. What is locked is kept in the cache."""
    lock = CHECKOUT / "requirements.lock"
    key = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()[:12]
    locked = CACHE / f"wheels-{key}"
    if not locked.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = CACHE / f".wheels-{secrets.token_hex(4)}"
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--require-hashes", "-r", lock, "-w", fresh)
        fresh.rename(locked)
    shutil.copytree(locked, out)
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out, cwd=CHECKOUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One that is up. ``leader`` is its PID 1 as this host numbers it."""

    name: str
    namespace: str
    leader: int

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command inside, as root."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.leader), "-m", "-u", "-i", "-n", "-p", "-C", *command],
            env={"PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"},
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{self.name}: {command} ended with {done.returncode}: {done.stdout} {done.stderr}")
        return done

    def property(self, unit: str, name: str) -> str:
        """What systemd says of a unit."""
        return self.run("systemctl", "show", "--value", "--property", name, unit).stdout.strip()


@contextlib.contextmanager
def booted(name: str, *, shared: dict[Path, str]) -> Iterator[Machine]:
    """A machine until the block ends. ``shared``: folders of this host by where the machine sees them."""
    namespace = f"f-{name}-{secrets.token_hex(3)}"
    run("ip", "netns", "add", namespace)
    try:
        _wire(namespace)
        process = subprocess.Popen(
            [
                "systemd-nspawn",
                "--quiet",
                "--boot",
                "--register=no",
                "--keep-unit",
                "--volatile=overlay",
                f"--machine={namespace}",
                f"--directory={image()}",
                f"--network-namespace-path=/run/netns/{namespace}",
                "--capability=all",
                "--system-call-filter=bpf perf_event_open",
                "--console=pipe",
                *(f"--bind-ro={here}:{there}" for here, there in shared.items()),
            ],
            env=dict(os.environ, SYSTEMD_NSPAWN_API_VFS_WRITABLE="1"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield _wait(process, name=name, namespace=namespace)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        run("ip", "netns", "delete", namespace)


def _wire(namespace: str) -> None:
    run("ip", "-n", namespace, "link", "set", "lo", "up")
    for interface, address in ADDRESSES.items():
        peer = f"{interface}-peer"
        run("ip", "-n", namespace, "link", "add", interface, "type", "veth", "peer", "name", peer)
        run("ip", "-n", namespace, "address", "add", address, "dev", interface)
        for end in (interface, peer):
            run("ip", "-n", namespace, "link", "set", end, "up")


def _wait(process: "subprocess.Popen[bytes]", *, name: str, namespace: str, limit_s: float = 90) -> Machine:
    """Until systemd inside says that it is up."""
    deadline = time.monotonic() + limit_s
    state = "nothing"
    while time.monotonic() < deadline and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            machine = Machine(name=name, namespace=namespace, leader=int(children[0]))
            state = machine.run("systemctl", "is-system-running", check=False).stdout.strip()
            if state == "running":
                # Its package lists are as old as the image, and it has no network to fetch newer ones.
                machine.run("mkdir", "-p", "/var/lib/apt/periodic")
                machine.run("touch", "/var/lib/apt/periodic/update-success-stamp")
                return machine
        time.sleep(0.2)
    raise RuntimeError(f"{name} did not boot within {limit_s:.0f} s; systemd said {state!r}")
