# SPDX-License-Identifier: Apache-2.0
"""Functions that break something in a Scene and return when it is repaired; ``scenarios.py`` says what is promised."""
