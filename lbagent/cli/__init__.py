# SPDX-License-Identifier: Apache-2.0
"""`lbagent` (daemon and offline verbs) and `lbctl` (talks to the running daemon)."""
