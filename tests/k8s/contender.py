# SPDX-License-Identifier: Apache-2.0
"""A host that writes addresses whenever it may: `python -m tests.k8s.contender KUBECONFIG NAMESPACE HOST NUMBER`.

It is lbagent's Kubernetes room with a tiny agent: as long as it holds the lease it gives the Service
``turn`` one address after the other out of 192.0.NUMBER.0/24, as fast as the API takes them.
"""

import asyncio
import contextlib
import itertools
import signal
import sys
import time
from pathlib import Path

from lbagent import log
from lbagent.config import Kubernetes, LeaseConfig
from lbagent.errors import KubeError
from lbagent.kube.cluster import Cluster
from lbagent.metrics import Metrics
from lbagent.model.pool import Assignment
from lbagent.model.service import ServiceKey

LEASE = "contended"
DURATION_S = 3.0


class Clocks:
    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


async def write(cluster: Cluster, service: ServiceKey, number: int) -> None:
    for turn in itertools.count():
        await asyncio.sleep(0.02)
        if service in cluster.services and cluster.holds_lease(time.monotonic()):
            address = f"192.0.{number}.{turn % 250 + 1}"
            with contextlib.suppress(KubeError):
                await cluster.assign(Assignment(service=service, addresses=(address,), pools=("p",)))


async def main(kubeconfig: str, namespace: str, host: str, number: int) -> None:
    log.configure(level="info")
    settings = Kubernetes(
        kubeconfig=Path(kubeconfig),
        lease=LeaseConfig(namespace=namespace, name=LEASE, duration_s=DURATION_S, renew_s=0.3),
        request_timeout_s=5,
    )
    cluster = Cluster(settings, host=host, clocks=Clocks(), metrics=Metrics(version="test", process=False))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(cluster.run(lambda: None)),
            group.create_task(write(cluster, ServiceKey(namespace, "turn"), number)),
        ]
        await stop.wait()
        for task in tasks:
            task.cancel()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
