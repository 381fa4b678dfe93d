# SPDX-License-Identifier: Apache-2.0
"""The only room that knows the others: one mutable world, one writer."""
