# SPDX-License-Identifier: Apache-2.0
"""The lab: client - ToR - LB hosts - nodes - pods as network namespaces of this machine.

``make demo`` and the tests marked ``netns`` stand on it; ``make lab`` leaves it up to play with.
"""
