# SPDX-License-Identifier: Apache-2.0
"""Nouns. Frozen values that every room may speak of; standard library only, no I/O, no clock."""
