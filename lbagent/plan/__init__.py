# SPDX-License-Identifier: Apache-2.0
"""Pure verbs: Snapshot in, Desired and Steps out. No clock, no randomness, no I/O, no third party."""
