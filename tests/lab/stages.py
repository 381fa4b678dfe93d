# SPDX-License-Identifier: Apache-2.0
"""The acts of the demo, one function each: do something, read back what came of it, say it.

The first line of each docstring is the title that is printed.
"""

import time
from typing import Any

from tests.lab.lab import Lab
from tests.lab.lbhost import BIN
from tests.lab.poll import wait_for
from tests.lab.report import Stage
from tests.lab.tor import Session
from tests.lab.traffic import Ledger, Load, ask_udp, burst

SERVICE = "web"
HTTP, ASK = 80, 53
RATE = 100.0  # requests per second under load
QUESTIONS = 20  # datagrams


def describe(lab: Lab, stage: Stage, *, kube: str) -> None:
    version = lab.tor.frr.vtysh("show version").splitlines()[0].split(" (")[0]
    stage.show("ToR", f"{version}, AS 65101, eBGP multipath, five-tuple hash")
    stage.show("nodes", ", ".join(f"{node.name} {node.segment.ip4}" for node in lab.topology.nodes))
    stage.show("Kubernetes API", f"{kube}, {lab.api.url}")
    stage.note(namespaces=len(lab.inventory.namespaces), tor=version)


def start_hosts(lab: Lab, stage: Stage) -> None:
    """Two LB hosts start: ExaBGP, the agent, the XDP program"""
    for host in lab.hosts.values():
        host.power_on()
    for host in lab.hosts.values():
        host.wait_ready()
        links = wait_for(
            f"XDP on both interfaces of {host.name}",
            host.xdp_links,
            until=lambda seen: len(seen) == 2,
            limit_s=40,
            logs=host.logs,
        )
        sessions = {f"IPv{family}": wait_session(lab, host.name, family) for family in (4, 6)}
        shown = ", ".join(f"{device} {mode}" for device, mode in sorted(links.items()))
        stage.require(all(mode.startswith("xdp ") for mode in links.values()), f"not attached natively: {shown}")
        stage.show(host.name, ", ".join(f"{what} pid {process.pid}" for what, process in host.processes.items()))
        stage.show("  kernel", shown)
        stage.show("  ToR session", ", ".join(f"{family} {session.state}" for family, session in sessions.items()))
        stage.note(**{host.name: {"xdp": links, "bgp": {family: s.state for family, s in sessions.items()}}})


def wait_session(lab: Lab, name: str, family: int, *, limit_s: float = 30.0) -> Session:
    host = lab.hosts[name]
    return wait_for(
        f"the ToR's IPv{family} session with {name}",
        lambda: lab.tor.session(host.lb, family=family),
        until=lambda seen: seen.up,
        limit_s=limit_s,
        logs=host.logs,
    )


def create_service(lab: Lab, stage: Stage) -> None:
    """A Service of type LoadBalancer with three pods is created"""
    pods = lab.deploy(SERVICE, families=(4, 6))
    posted = time.monotonic()
    addresses = lab.addresses_of(SERVICE)
    took_ms = (time.monotonic() - posted) * 1000
    service = lab.api.service(SERVICE)
    ingress = service["status"]["loadBalancer"]["ingress"]
    ports = ", ".join(f"{p['port']}/{p['protocol']} (node port {p['nodePort']})" for p in service["spec"]["ports"])
    stage.show("Service", f"default/{SERVICE}: {ports}")
    stage.show("pods", ", ".join(f"{pod.name} {pod.v4} on {pod.node.name}" for pod in pods))
    stage.show("status", "\n".join(f"ingress: {one['ip']}, ipMode {one.get('ipMode')}" for one in ingress))
    stage.show("written by", f"{lease_holder(lab)}, which holds the lease, after {took_ms:.0f} ms")
    stage.note(addresses=addresses, ingress=ingress, ms_to_address=round(took_ms, 1))


def lease_holder(lab: Lab) -> str:
    lease: dict[str, Any] = lab.api.call("GET", "/apis/coordination.k8s.io/v1/namespaces/lbagent/leases/lbagent")
    return str(lease["spec"].get("holderIdentity") or "nobody")


def see_routes(lab: Lab, stage: Stage) -> None:
    """The ToR learns the routes from both LB hosts and spreads traffic over them"""
    addresses = lab.addresses_of(SERVICE)
    for address in addresses:
        lab.wait_routes(address, tuple(lab.hosts))
        note_routes(lab, stage, address)
    stage.show("vtysh", lab.tor.route_shown(addresses[0]))
    stage.show("kernel", "\n".join(map(lab.tor.kernel_route, addresses)))


def note_routes(lab: Lab, stage: Stage, address: str) -> None:
    """For ``routes_seen`` of demo.json."""
    route = {
        "prefix": f"{address}/{128 if ':' in address else 32}",
        "bgp_paths": lab.tor.learned_from(address),
        "kernel_next_hops": lab.tor.next_hops(address),
    }
    stage.note(routes=[*stage.facts.get("routes", ()), route])


def see_kernels(lab: Lab, stage: Stage) -> None:
    """The kernel of each LB host holds the VIPs and has proven them with a packet"""
    address = lab.address_of(SERVICE)
    lab.wait_node_ports(SERVICE)
    vips_by_host = wait_for(
        "both LB hosts to have proven every VIP with the same rings",
        lambda: {host.name: host.vips() for host in lab.hosts.values()},
        until=agree,
        limit_s=15,
        logs=lab.logs,
    )
    for name, vips in vips_by_host.items():
        for vip in vips:
            stage.show(
                name, f"{vip['vip']:<26} {vip['mode']}, node port {vip['node_port']}, ring {vip['ring']}, proven"
            )
        records = lab.hosts[name].kernel_records(address)
        stage.show("  bpftool", "\n".join(f"lb_vips {record}" for record in records))
        stage.require(len(vips) == 4, f"{name} wants {len(vips)} VIPs, not 2 addresses x 2 ports")
        stage.require(records, f"{name}: the pinned map does not hold {address}")
        stage.note(**{name: {"vips": vips, "kernel_records": records}})
    stage.show("rings", "equal on both hosts")


def agree(vips_by_host: dict[str, list[dict[str, Any]]]) -> bool:
    """Everything programmed and proven, and the same rings everywhere. Probes may differ for a moment."""
    rings = [{vip["vip"]: vip["ring"] for vip in vips} for vips in vips_by_host.values()]
    proven = all(vip["programmed"] and vip["proven"] for vips in vips_by_host.values() for vip in vips)
    return proven and all(one and one == rings[0] for one in rings)


def send_requests(lab: Lab, stage: Stage) -> None:
    """The client sends 200 requests, half of them over IPv6"""
    v4, v6 = lab.addresses_of(SERVICE)
    before = {host.name: packets(host.metrics()) for host in lab.hosts.values()}
    ledger = Ledger(
        tuple(one for vip in (v4, v6) for one in burst(lab.client, vip, HTTP, count=100, rate=RATE).requests)
    )
    carriers = lab.tap.carriers(ledger)
    counted = {host.name: int(packets(host.metrics()) - before[host.name]) for host in lab.hosts.values()}
    tell(stage, ledger, carriers)
    stage.show("XDP counted", f"packets to the VIPs: {counts(counted)}")
    answers = [ask_udp(lab.client, vip, ASK, f"question {n}") for vip in (v4, v6) for n in range(QUESTIONS // 2)]
    stage.show("UDP", f"{QUESTIONS} datagrams sent, {len(answers)} answered")
    stage.note(xdp_packets=counted, udp={"sent": QUESTIONS, "answered": len(answers)})
    stage.require(not ledger.failures, f"{len(ledger.failures)} of {ledger.sent} requests failed: {ledger.by_error}")
    stage.require(all(carriers[name] for name in lab.hosts), f"one LB host carried nothing: {carriers}")
    stage.require(len(ledger.by_pod) == 3, f"not every pod was reached: {ledger.by_pod}")


def packets(metrics: dict[str, float]) -> float:
    """What the XDP program counted for all VIPs."""
    return sum(value for name, value in metrics.items() if name.startswith("lbagent_vip_packets_total"))


def tell(stage: Stage, ledger: Ledger, carriers: dict[str, int]) -> None:
    """The ledger of a stage, printed and noted."""
    answered = ledger.sent - len(ledger.failures)
    stage.show("requests", f"{ledger.sent} sent, {answered} answered, {len(ledger.failures)} failed")
    if ledger.failures:
        stage.show("errors", counts(ledger.by_error))
    stage.show("by pod", counts(ledger.by_pod))
    stage.show("by LB host", f"{counts(carriers)}   (SYNs on the ToR's links)")
    stage.show(
        "time",
        f"median {ledger.median_ms:.1f} ms, longest {ledger.longest_ms:.1f} ms; "
        f"{ledger.retransmits} segments retransmitted",
    )
    stage.note(requests={**ledger.summary(), "by_lb_host": carriers})


def counts(count_by_name: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in count_by_name.items()) or "-"


def kill_agent(lab: Lab, stage: Stage) -> None:
    """The agent of lb1 is killed (SIGKILL) under load, and started again"""
    address = lab.address_of(SERVICE)
    host = lab.hosts["lb1"]
    before = lab.tor.session(host.lb)
    with lab.tor.watching_routes(address) as changes, Load(lab.client, address, HTTP, rate=RATE) as load:
        time.sleep(1.0)
        killed = time.monotonic()
        pid = host.kill_agent()
        time.sleep(3.0)
        records = host.kernel_records(address)
        started = time.monotonic()
        without_agent = lab.tap.carriers(load.ledger.between(killed, started))
        host.start_agent()
        host.wait_ready()
        ready = time.monotonic()
        time.sleep(1.5)
    after = lab.tor.session(host.lb)
    stage.show(
        "killed", f"pid {pid}; {started - killed:.1f} s without it; the next one answers after {ready - started:.1f} s"
    )
    stage.show(
        "meanwhile",
        f"{counts(without_agent)}: lb1 forwards without its agent; its kernel holds {len(records)} records of the VIP",
    )
    tell(stage, load.ledger, lab.tap.carriers(load.ledger))
    stage.show("BGP from lb1", bgp_difference(before, after))
    stage.show("route changes", f"{len(changes)} in the ToR's kernel")
    stage.note(route_changes=changes, bgp_before=vars(before), bgp_after=vars(after), without_agent=without_agent)
    stage.require(not load.ledger.failures, f"{len(load.ledger.failures)} requests failed: {load.ledger.by_error}")
    stage.require(without_agent["lb1"], "lb1 carried nothing while its agent was away")
    stage.require(not changes, "the route flapped: " + "; ".join(changes))
    stage.require(after == before, "BGP messages were sent because an agent died")


def bgp_difference(before: Session, after: Session) -> str:
    updates = after.updates_received - before.updates_received
    notifications = after.notifications_received - before.notifications_received
    sessions = after.established_count - before.established_count
    return f"{updates} UPDATEs, {notifications} NOTIFICATIONs, {sessions} new sessions; {after.state}"


def lose_host(lab: Lab, stage: Stage) -> None:
    """LB host lb1 loses power under load"""
    address = lab.address_of(SERVICE)
    with Load(lab.client, address, HTTP, rate=RATE) as load:
        time.sleep(1.0)
        lost = time.monotonic()
        lab.hosts["lb1"].power_off()
        hosts = lab.wait_routes(address, ("lb2",))
        gone = time.monotonic()
        paths = wait_for(
            "bgpd to forget lb1's path",
            lambda: lab.tor.learned_from(address),
            until=lambda seen: "lb1" not in seen,
            limit_s=15,
        )
        time.sleep(3.0)
    settled = load.ledger.between(gone)
    gone_ms = (gone - lost) * 1000
    stage.show("route", f"to {' '.join(hosts)} alone after {gone_ms:.0f} ms; BGP paths: {', '.join(paths) or 'none'}")
    tell(stage, load.ledger, lab.tap.carriers(load.ledger))
    tell_settled(stage, settled, lab.tap.carriers(settled))
    note_routes(lab, stage, address)
    stage.note(ms_to_route_gone=round(gone_ms, 1))
    stage.require(not settled.failures, f"requests failed after the route had gone: {settled.by_error}")


def tell_settled(stage: Stage, settled: Ledger, carriers: dict[str, int]) -> None:
    """The part of a ledger that was sent after the ToR had changed its route."""
    stage.show("after the change", f"{settled.sent} requests, {len(settled.failures)} failed; {counts(carriers)}")
    stage.note(after_the_change={**settled.summary(), "by_lb_host": carriers})


def bring_host_back(lab: Lab, stage: Stage) -> None:
    """lb1 gets power again and takes its share back"""
    address = lab.address_of(SERVICE)
    host = lab.hosts["lb1"]
    with Load(lab.client, address, HTTP, rate=RATE) as load:
        started = time.monotonic()
        host.power_on()
        lab.wait_routes(address, tuple(lab.hosts), limit_s=60)
        back = time.monotonic()
        time.sleep(2.0)
    settled = load.ledger.between(back)
    carriers = lab.tap.carriers(settled)
    stage.show("route", f"to both hosts {back - started:.1f} s after power came back")
    tell(stage, load.ledger, lab.tap.carriers(load.ledger))
    tell_settled(stage, settled, carriers)
    note_routes(lab, stage, address)
    stage.note(s_to_route_back=round(back - started, 2))
    stage.require(not settled.failures, f"requests failed after lb1 was back: {settled.by_error}")
    stage.require(carriers["lb1"], "lb1 is announced but carried nothing")


def delete_service(lab: Lab, stage: Stage) -> None:
    """The Service is deleted"""
    addresses = lab.addresses_of(SERVICE)
    begun = time.monotonic()
    lab.api.delete_service(SERVICE)
    for address in addresses:
        lab.wait_routes(address, ())
        note_routes(lab, stage, address)
    gone_ms = (time.monotonic() - begun) * 1000
    stage.show("routes", f"gone from the ToR after {gone_ms:.0f} ms")
    stage.show("vtysh", lab.tor.route_shown(addresses[0]))
    for host in lab.hosts.values():
        wait_for(f"the kernel of {host.name} to forget the VIPs", host.vips, until=is_empty, limit_s=15, logs=host.logs)
        records = [key for address in addresses for key in host.kernel_records(address)]
        stage.require(not records, f"{host.name}: the pinned maps still hold {records}")
    forgotten_ms = (time.monotonic() - begun) * 1000
    stage.show("kernels", f"hold no record of them any more, seen {forgotten_ms:.0f} ms after the deletion")
    wait_for("the Service object to be gone", lambda: not lab.has_service(SERVICE), limit_s=60, logs=lab.logs)
    removed_ms = (time.monotonic() - begun) * 1000
    stage.show("API", f"the Service object is gone (our finalizer is off) after {removed_ms:.0f} ms")
    ledger = burst(lab.client, addresses[0], HTTP, count=1)
    stage.show("the client gets", counts(ledger.by_error))
    stage.note(ms_to_routes_gone=round(gone_ms, 1), ms_to_kernels_empty=round(forgotten_ms, 1))
    stage.note(ms_to_object_gone=round(removed_ms, 1), client=ledger.by_error)
    stage.require(len(ledger.failures) == ledger.sent, "the address still answers")


def is_empty(rows: list[Any]) -> bool:
    return not rows


def invitation(lab: Lab) -> str:
    """What a person can do with a lab that stays up."""
    address = lab.address_of(SERVICE)
    lb1 = lab.hosts["lb1"]
    ctl = f"{BIN}/lbctl --socket {lb1.folder}/run/lbagent.sock"
    enter = f"nsenter --net={lab.client.path}"
    rows = (
        ("ask the Service", f"{enter} curl -s http://{address}/"),
        ("the ToR", f"{lab.tor.vtysh_command} -c 'show ip route bgp' -c 'show bgp summary'"),
        ("LB host lb1", f"{ctl} status"),
        ("", f"{ctl} show vips"),
        ("kill its agent", f"kill -9 {lb1.agent.pid if lb1.agent else '?'}"),
        ("its logs", f"tail -f {lb1.folder}/agent.log {lb1.folder}/bgp.log"),
        ("its packets", f"nsenter --net={lb1.namespace.path} tcpdump -nli eth0"),
        ("Kubernetes", f"{enter} curl -s -H 'Authorization: Bearer {lab.api.token}' {lab.api.url}/api/v1/services"),
        ("remove the lab", f"LBA_PREFIX={lab.inventory.prefix} make lab-down"),
    )
    return "\n".join(f"{what:<16} {command}" for what, command in rows)
