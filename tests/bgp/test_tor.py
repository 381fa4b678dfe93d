# SPDX-License-Identifier: Apache-2.0
"""The snippets for ToR routers: rendered for all, and run on the three that run here."""

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lbagent.bgp.tor import RouterOs, snippet
from lbagent.config import Config
from lbagent.errors import ConfigError
from lbagent.model.route import PathPolicy, Route
from tests.bgp.rig import Rig, is_synced, speaking, until
from tests.lab.bird import Bird
from tests.lab.frr import Frr
from tests.lab.gobgp import Gobgp

GOLDEN = Path(__file__).resolve().parent.parent / "golden/tor"
V4, V6, FOREIGN = "192.0.2.1/32", "2001:db8::1/128", "198.51.100.1/32"
POLICY = PathPolicy(communities=("65001:100", "65001:1:2"), med=5)


def config(**bgp: Any) -> Config:
    peers = [
        {"name": "tor1", "address": "10.0.1.2", "local_address": "10.0.1.1", "peer_as": 65101, "max_routes": 50},
        {"name": "tor1-v6", "address": "fd00:1::2", "local_address": "fd00:1::1", "peer_as": 65101}
        | {"families": ["ipv4", "ipv6"], "gtsm": True, "graceful_restart_s": 15, "hold_time_s": 3},
        {"name": "spine", "address": "10.9.9.2", "local_address": "10.9.9.1", "peer_as": 65200, "multihop_ttl": 3}
        | {"bfd_ms": 300},
    ]
    return make_config(**{"local_as": 65001, "router_id": "10.0.1.1", "peers": peers, **bgp})


def make_config(name: str = "lb1", **bgp: Any) -> Config:
    pools = [{"name": "default", "addresses": ["192.0.2.0/28", "192.0.2.32-192.0.2.40", "2001:db8::/120"]}]
    xdp = {"interfaces": ["eth0"], "snat": {"addresses": ["10.255.0.1"]}}
    return Config.model_validate({"host": {"name": name}, "pools": pools, "xdp": xdp, "bgp": bgp})


@pytest.mark.parametrize("peer", ["tor1", "tor1-v6", "spine"])
@pytest.mark.parametrize("os", RouterOs)
def test_the_snippet_is_as_it_was_reviewed(os: RouterOs, peer: str, update_golden: bool) -> None:
    golden = GOLDEN / f"{peer}.{os.value}"
    text = snippet(config(), peer=peer, os=os)
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("os", RouterOs)
def test_a_snippet_never_prints_a_password(os: RouterOs, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o600)
    peer = {"name": "a", "address": "10.0.1.2", "local_address": "10.0.1.1", "peer_as": 1, "password_file": str(secret)}
    text = snippet(config(peers=[peer]), peer="a", os=os)
    assert "hunter2" not in text
    assert "PASSWORD" in text


def test_an_unknown_peer_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no peer is named nobody \(configured: tor1, tor1-v6, spine\)"):
        snippet(config(), peer="nobody", os=RouterOs.FRR)


# --- run ------------------------------------------------------------------------------------------

Router = Frr | Bird | Gobgp


def frr(rig: Rig, configs: list[Config]) -> Router:
    return Frr(rig.tor.name, "".join(_snippets(configs, RouterOs.FRR)))


def bird(rig: Rig, configs: list[Config]) -> Router:
    kernel = "protocol kernel {{ ipv{0} {{ export where source = RTS_BGP; }}; merge paths on limit 16; }}\n"
    base = "router id 10.0.1.2;\nprotocol device {}\nprotocol direct { ipv4; ipv6; }\n"
    base += kernel.format(4) + kernel.format(6)
    return Bird(rig.tor.name, base + "".join(_snippets(configs, RouterOs.BIRD)))


def gobgp(rig: Rig, configs: list[Config]) -> Router:
    names = [f'"lbagent_{c.host.name}_{peer.name}"' for c in configs for peer in c.bgp.peers]
    base = f"""
[global.config]
  as = 65101
  router-id = "10.0.1.2"
[global.use-multiple-paths.config]
  enabled = true
[global.apply-policy.config]
  import-policy-list = [{", ".join(names)}]
  default-import-policy = "reject-route"
"""
    return Gobgp(rig.tor.name, base + "".join(_snippets(configs, RouterOs.GOBGP)))


def _snippets(configs: list[Config], os: RouterOs) -> Iterator[str]:
    for one in configs:
        for peer in one.bgp.peers:
            yield snippet(one, peer=peer.name, os=os)


def next_hops(router: Router, prefix: str) -> frozenset[str]:
    """Where the router sends packets: what its kernel has, or (GoBGP has none) its best paths."""
    if not isinstance(router, Gobgp):
        return router.kernel_next_hops(prefix.partition("/")[0])
    paths = router.bgp_routes(6 if ":" in prefix else 4).get(prefix, [])
    ranks = [_gobgp_rank(path) for path in paths]
    return frozenset(_gobgp_hop(path) for path, rank in zip(paths, ranks, strict=True) if rank == max(ranks))


def _gobgp_hop(path: dict[str, Any]) -> str:
    hops = [a.get("nexthop") for a in path["attrs"] if a["type"] in (3, 14)]
    return str(hops[0])


def _gobgp_rank(path: dict[str, Any]) -> int:
    return int(next((a["value"] for a in path["attrs"] if a["type"] == 5), 100))


@contextmanager
def hosts(make_rig: Callable[..., Rig], asns: tuple[int, int]) -> Iterator[tuple[list[Rig], list[Config]]]:
    first = make_rig()
    rigs = [first, make_rig(number=2, tor=first.tor)]
    configs = []
    for rig, asn in zip(rigs, asns, strict=True):
        tor = {"peer_as": 65101}
        peers = [
            {"name": "tor", "address": rig.tor4, "local_address": rig.lb4, **tor},
            {"name": "tor6", "address": rig.tor6, "local_address": rig.lb6, **tor},
        ]
        one = make_config(rig.lb.name, local_as=asn, router_id=rig.lb4, peers=peers)
        rig.bgp = one.bgp
        rig.start_exabgp()
        configs.append(one)
    yield rigs, configs


@pytest.mark.netns
@pytest.mark.parametrize("asns", [(65001, 65001), (65001, 65002)], ids=["same-as", "different-as"])
@pytest.mark.parametrize("make_router", [frr, bird, gobgp])
async def test_a_router_with_our_snippet_spreads_drains_and_drops(
    make_router: Callable[[Rig, list[Config]], Router], asns: tuple[int, int], make_rig: Callable[..., Rig]
) -> None:
    wanted = frozenset(Route(prefix=prefix, policy=POLICY) for prefix in (V4, V6, FOREIGN))
    drained = PathPolicy(communities=(*POLICY.communities, "graceful-shutdown"), med=5)
    async with AsyncExitStack() as stack:
        rigs, configs = stack.enter_context(hosts(make_rig, asns))
        router = make_router(rigs[0], configs).start()
        stack.callback(router.stop)
        one, two = [await stack.enter_async_context(speaking(rig)) for rig in rigs]
        one.want(wanted)
        two.want(wanted)

        async def expect(what: str, *numbers: int) -> None:
            expected = (
                frozenset(f"10.0.{n}.1" for n in numbers),
                frozenset(f"fd00:{n}::1" for n in numbers),
            )
            await until(
                what, lambda: (next_hops(router, V4), next_hops(router, V6)), expected, limit_s=30, log=rigs[0].log
            )

        await expect("both hosts", 1, 2)
        assert FOREIGN not in router.bgp_routes(4)
        assert_attributes(router, asns)
        one.want(frozenset(Route(prefix=r.prefix, policy=drained) for r in wanted))
        await expect("the first one drained", 2)
        one.want(wanted)
        await expect("undrained", 1, 2)
        two.want(frozenset())
        await expect("the second one withdrawn", 1)
        two.want(wanted)
        await expect("announced again", 1, 2)
        rigs[0].stop_exabgp()
        await expect("the first one stopped", 2)
        await until("synced", is_synced(two))


def assert_attributes(router: Router, asns: tuple[int, int]) -> None:
    """What left as POLICY has arrived as POLICY, from each host."""
    paths = router.bgp_routes(4)[V4]
    if isinstance(router, Frr):
        paths = router.bgp_paths(V4)
        assert sorted(int(path["aspath"]["string"]) for path in paths) == sorted(asns)
        for path in paths:
            assert path["community"]["list"] == ["65001:100"]
            assert path["largeCommunity"]["list"] == ["65001:1:2"]
            assert path["metric"] == 5
    elif isinstance(router, Bird):
        assert sorted(int(path["BGP.as_path"]) for path in paths) == sorted(asns)
        for path in paths:
            assert path["BGP.community"] == "(65001,100)"
            assert path["BGP.large_community"] == "(65001, 1, 2)"
            assert path["BGP.med"] == "5"
    else:
        for path in paths:
            by_type = {attribute["type"]: attribute for attribute in path["attrs"]}
            assert by_type[8]["communities"] == [(65001 << 16) + 100]
            assert by_type[4]["metric"] == 5
            assert by_type[32]["value"] == [{"ASN": 65001, "LocalData1": 1, "LocalData2": 2}]
