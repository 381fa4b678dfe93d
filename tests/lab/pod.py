# SPDX-License-Identifier: Apache-2.0
"""A pod of the lab: answers HTTP and UDP with its name and the source address that it saw.

Runs as a plain file, standard library only: ``python pod.py --name web-1 --node node1``.

``GET /``          a JSON object: pod, node, source, source_port, connection (how many requests it carried)
``GET /bytes/N``   N bytes
``POST /``         the same object with ``received``, the length of the body
UDP                one datagram with the same object; ``echo`` repeats what was sent
"""

import argparse
import asyncio
import json
import socket


def plain(address: str) -> str:
    """An IPv4 client of a dual-stack socket, written as IPv4."""
    return address.removeprefix("::ffff:")


class Pod:
    def __init__(self, name: str, node: str) -> None:
        self.name = name
        self.node = node

    def answer(self, peer: tuple[str, int], **more: object) -> bytes:
        seen = {"pod": self.name, "node": self.node, "source": plain(peer[0]), "source_port": peer[1], **more}
        return json.dumps(seen).encode()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, as many requests as the client likes."""
        peer = writer.get_extra_info("peername")[:2]
        number = 0
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                number += 1
                request, *lines = head.decode("latin-1").split("\r\n")
                headers = {key.strip().lower(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
                received = 0
                while received < int(headers.get("content-length", 0)):
                    received += len(await reader.read(65536))
                path = request.split(" ")[1]
                if path.startswith("/bytes/"):
                    body = b"x" * int(path.removeprefix("/bytes/"))
                else:
                    body = self.answer(peer, connection=number, received=received)
                close = headers.get("connection") == "close"
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n"
                    % (len(body), b"Connection: close\r\n" if close else b"")
                    + body
                )
                await writer.drain()
                if close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()


class Datagrams(asyncio.DatagramProtocol):
    def __init__(self, pod: Pod) -> None:
        self.pod = pod

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, datagram: bytes, peer: tuple[str, int]) -> None:
        self.transport.sendto(self.pod.answer(peer[:2], echo=datagram.decode("latin-1")), peer)  # type: ignore[attr-defined]


async def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--name", required=True)
    arguments.add_argument("--node", default="")
    arguments.add_argument("--http", type=int, default=8080)
    arguments.add_argument("--udp", type=int, default=8081)
    chosen = arguments.parse_args()
    pod = Pod(chosen.name, chosen.node)
    both = socket.create_server(("::", chosen.http), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    server = await asyncio.start_server(pod.serve, sock=both)
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    datagrams.bind(("::", chosen.udp))
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: Datagrams(pod), sock=datagrams)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
