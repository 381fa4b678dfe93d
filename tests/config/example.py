# SPDX-License-Identifier: Apache-2.0
"""A small configuration that is right; tests spoil it in one place each."""

GOOD = """\
host: {name: lb1}
pools:
  - name: default
    addresses: [203.0.113.0/28, 203.0.113.32-203.0.113.40]
    policies: [std]
bgp:
  local_as: 65001
  router_id: 10.0.1.1
  peers:
    - name: tor1
      address: 10.0.1.2
      local_address: 10.0.1.1
      peer_as: 65101
  policies:
    - {name: std, communities: ["65001:100"]}
    - {name: far, communities: [no-export], prepend: 2, peers: [tor1]}
xdp:
  interfaces: [eth0]
"""


def changed(old: str, new: str) -> str:
    """The example with one place spoilt."""
    assert old in GOOD
    return GOOD.replace(old, new)
