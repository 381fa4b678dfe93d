# SPDX-License-Identifier: Apache-2.0
"""Why a Service is where it is: one Reason each, from a closed list.

The same word is printed by the CLI, Events, metrics, logs and docs/reference/reasons.md. A new
refusal is one member here, with its sentence and what the operator does next, and one test.
"""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """``value`` is the machine word, ``sentence`` says it in words, ``hint`` what to do next."""

    sentence: str
    hint: str

    def __new__(cls, word: str, sentence: str, hint: str) -> "Reason":
        self = str.__new__(cls, word)
        self._value_ = word
        self.sentence = sentence
        self.hint = hint
        return self

    SATISFIED = ("satisfied", "has its addresses, is forwarded and announced", "")
    NOT_LOAD_BALANCER = ("not_load_balancer", "is not of type LoadBalancer", "")
    NOT_OURS = (
        "not_ours",
        "asks for another load-balancer class",
        "set spec.loadBalancerClass to ours, or leave it empty where class_less is on",
    )
    DELETING = ("deleting", "is being deleted", "")
    NOT_LISTED = ("not_listed", "the first complete list has not arrived yet", "wait, or check the API server")
    PENDING_ASSIGNMENT = (
        "pending_assignment",
        "waits for the elected LB host to write its address",
        "check which host holds the lease: lbctl status",
    )
    NO_POOL = ("no_pool", "no pool may serve it", "add a pool for its address family, or set auto_assign: true")
    UNKNOWN_POOL = ("unknown_pool", "asks for a pool that is not configured", "correct the annotation, or add the pool")
    POOL_SELECTOR_MISMATCH = (
        "pool_selector_mismatch",
        "the pool does not admit this Service",
        "check namespaces and selectors of the pool",
    )
    OUT_OF_IPS = ("out_of_ips", "no free address is left", "enlarge the pool, or release a Service")
    OUTSIDE_POOLS = ("outside_pools", "asks for an address outside every pool", "ask for an address of a pool")
    ALREADY_ALLOCATED = (
        "already_allocated",
        "asks for an address that another Service holds",
        "ask for another address, or set lbagent.io/allow-shared-ip on both",
    )
    ALREADY_ALLOCATED_INCOMPATIBLE = (
        "already_allocated_incompatible_service",
        "may not share the address: a port, the sharing key or the traffic policy conflicts",
        "give both Services the same key, different ports and the same policy",
    )
    COOLING_DOWN = (
        "cooling_down",
        "asks for an address that another Service gave back a moment ago",
        "wait: it is free again after cool_down_s",
    )
    QUOTA_EXCEEDED = (
        "quota_exceeded",
        "its namespace holds as many addresses as it may",
        "raise namespace_quota, share an address, or release a Service",
    )
    BAD_REQUEST = ("bad_request", "its address request cannot be understood", "correct the annotation it names")
    BAD_SOURCE_RANGES = (
        "bad_source_ranges",
        "loadBalancerSourceRanges holds a malformed CIDR",
        "correct the entry it names",
    )
    NO_SUPPORTED_PORT = ("no_supported_port", "has no TCP or UDP port", "lbagent forwards TCP and UDP")
    NO_NODE_PORT = (
        "no_node_port",
        "has no node port, which nat mode needs",
        "set allocateLoadBalancerNodePorts: true, or choose a dsr mode",
    )
    MODE_UNAVAILABLE = (
        "mode_unavailable",
        "asks for a forwarding mode that this host cannot give",
        "correct lbagent.io/mode, or configure what the mode needs",
    )
    NO_ENDPOINTS = ("no_endpoints", "has no usable endpoint", "check its pods: kubectl get endpointslices")
    NO_NODES = ("no_nodes", "no eligible node can serve it", "check node labels, taints and addresses")
    NO_HEALTHY_BACKENDS = (
        "no_healthy_backends",
        "every node that could serve it is down",
        "check the node port from this host: lbctl explain",
    )
    HOST_STALE = (
        "host_stale",
        "this host has not heard from the API server for too long and announces nothing",
        "mend the way to the API server; kubernetes.stale_after_s and stale_action decide",
    )
    HOST_DRAINING = ("host_draining", "this host is being drained and announces nothing", "lbctl undrain")
    NOT_FORWARDING = (
        "not_forwarding",
        "this host's kernel does not provably forward it",
        "see lbctl explain, lbagent doctor and the log",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The Reason of one Service with what it is about (``detail`` completes the sentence)."""

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.reason.value}: {self.reason.sentence}"
        return f"{text} ({self.detail})" if self.detail else text
