# SPDX-License-Identifier: Apache-2.0
"""The backends' pulse: check (one attempt), judge (rise and fall), schedule (who, when, how many at once)."""
