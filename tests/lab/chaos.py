# SPDX-License-Identifier: Apache-2.0
"""``make chaos``: every fault of ``scenarios.py`` under load, one after the other, and the ledger of what came of each.

A promise that is not kept stands in the ledger as that. ``docs/reliability.md`` is written from a run.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tests.lab import demo
from tests.lab.inventory import REPOSITORY
from tests.lab.lab import Lab
from tests.lab.scenarios import SCENARIOS
from tests.lab.scene import RATE, Entry, run, settle

PAGE = REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- made by make chaos KUBE={kube} -->", "<!-- end -->"


def table(entries: Iterable[Entry]) -> str:
    """The ledger as Markdown."""
    rows = [
        "| fault | promised | what happened | requests: failed of sent | BGP messages | repaired after |",
        "|---|---|---|---|---|---|",
    ]
    for one in entries:
        failed = len(one.requests.failures)
        lost = f"{failed} of {one.requests.sent:,}"
        if failed:
            lost += f", the last {max(0.0, one.lost_for_s):.1f} s after the fault"
        verdict = "kept" if one.kept else "**not kept**: " + "; ".join(text.splitlines()[0] for text in one.broken)
        happened = "; ".join([verdict, *one.said])
        repair = "-" if one.repair_s is None else f"{one.repair_s:.1f} s"
        rows.append(
            f"| {one.scenario.name} | {one.scenario.promise} | {happened} | {lost} | {one.messages} | {repair} |"
        )
    return "\n".join(rows)


def write_page(page: Path, entries: Iterable[Entry], *, kube: str, about: str) -> None:
    """Replace the ledger of this form of the Kubernetes API."""
    begin = BEGIN.format(kube=kube)
    head, _, rest = page.read_text().partition(begin)
    _, _, foot = rest.partition(END)
    page.write_text(f"{head}{begin}\n\n{about}\n\n{table(entries)}\n\n{END}{foot}")


def write_json(path: Path, entries: Iterable[Entry]) -> None:
    content = [
        {
            "fault": one.scenario.name,
            "kept": one.kept,
            "requests": one.requests.summary(),
            "bgp_messages": one.messages,
            "route_changes": one.route_changes,
            "lost_for_s": round(one.lost_for_s, 2),
            "repair_s": one.repair_s and round(one.repair_s, 2),
            "said": one.said,
            "broken": one.broken,
        }
        for one in entries
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> int:
    names = [one.name for one in SCENARIOS]
    arguments = argparse.ArgumentParser(prog="chaos", description="Faults under load in the lab. Needs root.")
    arguments.add_argument("--list", action="store_true", help="the names of the faults")
    arguments.add_argument("--only", action="append", metavar="WORDS", help="faults whose name holds these words")
    arguments.add_argument("--short", action="store_true", help="fewer repetitions, shorter outages, as in the tests")
    arguments.add_argument("--write", action="store_true", help=f"write the ledger to {PAGE.relative_to(REPOSITORY)}")
    arguments.add_argument("--kube", choices=("embedded", "real"), default=os.environ.get("KUBE") or "embedded")
    chosen = arguments.parse_args()
    if chosen.list:
        print("\n".join(names))
        return 0
    wanted = [one for one in SCENARIOS if not chosen.only or any(words in one.name for words in chosen.only)]
    prefix = os.environ.get("LBA_PREFIX", "lba-") + "chaos-"
    demo.remove_leftovers(prefix)
    entries: list[Entry] = []
    with Lab.up(prefix=prefix, kube=chosen.kube) as lab:
        for host in lab.hosts.values():
            host.power_on()
        settle(lab)
        lab.deploy("web", pods=len(lab.topology.nodes) - 1)
        address = lab.address_of("web")
        for scenario in wanted:
            if scenario.kube not in ("", chosen.kube):
                print(f"not run {scenario.name}: needs KUBE={scenario.kube}")
                continue
            entries.append(run(lab, scenario, address, is_short=chosen.short))
            print(entries[-1].told(), flush=True)
    write_json(REPOSITORY / "build" / "chaos.json", entries)
    if chosen.write:
        machine = demo.machine()
        about = (
            f"{time.strftime('%Y-%m-%d', time.gmtime())}, {machine['cpus']} cores with a load of "
            f"{os.getloadavg()[2]:.0f} from other work, Linux {machine['kernel']}, {RATE:g} requests per second."
        )
        write_page(PAGE, entries, kube=chosen.kube, about=about)
    broken = [one.scenario.name for one in entries if not one.kept]
    print(
        f"{len(entries) - len(broken)} of {len(entries)} promises kept" + "".join(f"\n  not: {one}" for one in broken)
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
