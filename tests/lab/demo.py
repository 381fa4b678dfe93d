# SPDX-License-Identifier: Apache-2.0
"""``make demo``: a LoadBalancer Service becomes reachable through real BGP and real XDP, and stays so.

Every line shows what was read back: from the Kubernetes API, the ToR's FRR and kernel, the LB hosts' kernels,
and the client's own count of its requests. ``build/demo.json`` holds the same for machines.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from tests.lab import stages
from tests.lab.inventory import REPOSITORY, Inventory
from tests.lab.lab import Lab, folder_of, is_used
from tests.lab.netns import NAMESPACES, run
from tests.lab.poll import LabError
from tests.lab.report import WIDTH, Report

STORY = (
    stages.start_hosts,
    stages.create_service,
    stages.see_routes,
    stages.see_kernels,
    stages.send_requests,
    stages.kill_agent,
    stages.lose_host,
    stages.bring_host_back,
    stages.delete_service,
)


def demo(*, prefix: str, kube: str, json_path: Path) -> int:
    """The whole story; exit code 0 when every stage is ok and nothing is left behind."""
    report = Report()
    report.facts = {"kube": kube, "prefix": prefix, "machine": machine()}
    lab: Lab | None = None
    title(report, kube)
    try:
        remove_leftovers(prefix)
        with report.stage("The lab is built: network namespaces joined by veth, FRR as the ToR") as stage:
            lab = Lab.up(prefix=prefix, kube=kube)
            stages.describe(lab, stage, kube=kube)
        for act in STORY:
            with report.stage(act.__doc__.splitlines()[0] if act.__doc__ else act.__name__) as stage:
                lab.tap.clear()
                act(lab, stage)
    except LabError:
        pass  # the stage has told it
    except KeyboardInterrupt:
        report.line("interrupted")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # taking down is not interrupted
        finished = len(report.stages) == len(STORY) + 1 and report.ok
        clean = take_down(report, lab, prefix)
        report.facts["clean"] = clean
        report.write(json_path)
    conclude(report, json_path, finished=finished and clean)
    return 0 if finished and clean else 1


def title(report: Report, kube: str) -> None:
    report.line("lbagent demo".ljust(WIDTH - 24) + time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()).rjust(24))
    report.line("-" * WIDTH)
    report.line("client -- ToR (FRR) --+-- lb1 --+-- node1 node2 node3 -- pods")
    report.line(f"                      +-- lb2 --+                              Kubernetes API: {kube}")
    report.line()


def machine() -> dict[str, str]:
    return {"kernel": os.uname().release, "python": sys.version.split()[0], "cpus": str(os.cpu_count())}


def remove_leftovers(prefix: str) -> None:
    """Of a demo that was killed. A demo that still runs holds the lock and is left alone by Lab.up."""
    folder = folder_of(prefix)
    if (folder / "inventory.json").exists() and not is_used(folder):
        problems = Inventory.load(folder).remove()
        if problems:
            raise LabError("leftovers of an earlier lab: " + "; ".join(problems))


def take_down(report: Report, lab: Lab | None, prefix: str) -> bool:
    """Remove everything and look whether it is gone."""
    try:
        with report.stage("Everything is taken away again") as stage:
            problems = lab.down() if lab else []
            stage.require(not problems, "\n".join(problems))
            left = [str(path) for path in (*NAMESPACES.glob(f"{prefix}*"), folder_of(prefix)) if path.exists()]
            left += [line for line in run("mount").splitlines() if str(folder_of(prefix)) in line]
            stage.require(not left or lab is None, f"left behind: {', '.join(left)}")
            stage.show("left behind", "no namespace, no process, no pinned map, no file")
            return True
    except LabError:
        return False


def conclude(report: Report, json_path: Path, *, finished: bool) -> None:
    report.line("-" * WIDTH)
    word = "Every stage is ok" if finished else "FAILED"
    shown = json_path.relative_to(REPOSITORY) if json_path.is_relative_to(REPOSITORY) else json_path
    report.line(f"{word}: {len(report.stages)} stages, {report.seconds:.1f} s. Details: {shown}")


def keep(*, prefix: str, kube: str) -> int:
    """``make lab``: the lab with two LB hosts and one Service, left up."""
    report = Report()
    lab: Lab | None = None
    try:
        with report.stage("The lab is built") as stage:
            lab = Lab.up(prefix=prefix, kube=kube)
            stages.describe(lab, stage, kube=kube)
        for act in (stages.start_hosts, stages.create_service, stages.see_routes):
            with report.stage(act.__doc__.splitlines()[0] if act.__doc__ else act.__name__) as stage:
                act(lab, stage)
    except (LabError, KeyboardInterrupt):
        if lab:
            lab.down()
        return 1
    report.line(stages.invitation(lab))
    lab.release()
    return 0


def down(*, prefix: str) -> int:
    """``make lab-down``."""
    folder = folder_of(prefix)
    if not (folder / "inventory.json").exists():
        print(f"no lab {prefix}* is up")
        return 0
    problems = Inventory.load(folder).remove()
    print("\n".join(problems) or f"the lab {prefix}* is removed")
    return 1 if problems else 0


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    arguments = argparse.ArgumentParser(prog="demo", description="The lbagent demo and its lab. Needs root.")
    what = arguments.add_mutually_exclusive_group()
    what.add_argument("--keep", action="store_true", help="build the lab with one Service and leave it up")
    what.add_argument("--down", action="store_true", help="remove a lab that was left up")
    arguments.add_argument("--kube", choices=("embedded", "real"), default=os.environ.get("KUBE") or "embedded")
    arguments.add_argument("--json", type=Path, default=REPOSITORY / "build" / "demo.json")
    chosen = arguments.parse_args()
    if os.geteuid():
        print("demo: needs root: it builds network namespaces and loads XDP programs", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    prefix = os.environ.get("LBA_PREFIX", "lba-")
    if chosen.down:
        return down(prefix=prefix)
    if chosen.keep:
        return keep(prefix=prefix, kube=chosen.kube)
    return demo(prefix=f"{prefix}demo-", kube=chosen.kube, json_path=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
