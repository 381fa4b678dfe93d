# SPDX-License-Identifier: Apache-2.0
"""lbagent: an external load-balancer tier for Kubernetes on bare metal."""

__version__ = "0.1.0"
