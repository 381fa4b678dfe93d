# SPDX-License-Identifier: Apache-2.0
"""What the cluster shows already: does a status say what it should, and is a Reason worth telling?"""

from collections.abc import Iterable

from lbagent.model.pool import Assignment
from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import IpMode, Service

CONDITION = "lbagent.io/Satisfied"
"""Type of the condition by which kube/publish shows the Reason."""

FINALIZER = "service.kubernetes.io/load-balancer-cleanup"
"""The service controller's own word: the Service stays until its load balancer is gone."""

OF_THIS_HOST = frozenset({Reason.MODE_UNAVAILABLE, Reason.NO_HEALTHY_BACKENDS, Reason.NOT_FORWARDING})
"""Every host speaks for itself about these; about all others only the lease holder speaks."""

_SILENT = frozenset(
    {
        Reason.NOT_OURS,
        Reason.NOT_LISTED,
        Reason.DELETING,
        Reason.PENDING_ASSIGNMENT,  # the Assign beside it says more
        Reason.HOST_DRAINING,  # the operator's own doing
        Reason.HOST_STALE,  # nobody would hear it
    }
)


def is_written(service: Service, assignment: Assignment) -> bool:
    """Does the status say what the Assignment says? An unset ipMode means VIP (the API's default)."""
    if service.status_addresses != assignment.addresses:
        return False
    errors = _errors(assignment.port_errors)
    return all(
        (ingress.ip_mode or IpMode.VIP) is assignment.ip_mode and _errors(ingress.port_errors) == errors
        for ingress in service.ingress
    )


def was_ours(service: Service) -> bool:
    """Did we serve a Service that is of another type now? Nobody else takes our finalizer off it then."""
    return FINALIZER in service.finalizers and any(c.type == CONDITION for c in service.conditions)


def _errors(port_errors: Iterable[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    return sorted((port, str(protocol), error) for port, protocol, error in port_errors if error)


def is_reported(service: Service, judgement: Judgement) -> bool:
    """Is nothing left to tell? A Service that asks no more must lose the condition it may still carry.

    But after its finalizer, for the condition is the sign that the finalizer is of our making.
    """
    shown = next((condition for condition in service.conditions if condition.type == CONDITION), None)
    if judgement.reason is Reason.NOT_LOAD_BALANCER:
        return shown is None or FINALIZER in service.finalizers
    if judgement.reason in _SILENT:
        return True
    return shown is not None and shown.reason == judgement.reason.value and judgement.detail in shown.message
