# SPDX-License-Identifier: Apache-2.0
"""A daemon that does nothing but forward, so that a test can kill it: ``daemon.py PATHS_AS_JSON VIPS``."""

import asyncio
import sys
import time

from lbagent import log
from lbagent.config import Limits, Paths, Xdp
from lbagent.xdp.forwarder import Forwarder
from tests.xdp.lane import INTERFACES, NODES, ROUTERS, TCP_VIP, UDP_VIP, forward_to, ring_over


async def main() -> None:
    """Print ``ready`` and what was held at the start; then run until killed."""
    forwarder = Forwarder(
        Xdp(interfaces=INTERFACES, limits=Limits(vips=int(sys.argv[2]))),
        Paths.model_validate_json(sys.argv[1]),
        clock=time.monotonic,
        routers=ROUTERS,
    )
    await forwarder.open()
    held = forwarder.observed()
    forwarder.track(frozenset(NODES))
    async with asyncio.TaskGroup() as group:
        group.create_task(forwarder.run(lambda: None))
        while forwarder.reachable != set(NODES):
            await asyncio.sleep(0.01)
        ring = ring_over(*NODES)
        forwarder.program([forward_to(ring, vip) for vip in (TCP_VIP, UDP_VIP)], [ring])
        unproven = forwarder.observed().unproven
        print("ready", f"held={len(held.forwards)}", f"unproven={len(unproven)}", flush=True)


if __name__ == "__main__":
    log.configure()
    asyncio.run(main())
