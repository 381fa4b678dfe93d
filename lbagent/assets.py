# SPDX-License-Identifier: Apache-2.0
"""Where the files are that other programs read: the kernel's C and ExaBGP's template.

A wheel carries them inside the package (``lbagent/_assets``), a checkout has them at its root;
both have the same sub-folders, so the rest of the code does not know the difference.
"""

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent


def path(name: Literal["ebpf", "bgp"]) -> Path:
    """Absolute path of that folder (BCC compiles elsewhere and needs it absolute)."""
    packaged = _PACKAGE / "_assets"
    return (packaged if packaged.is_dir() else _PACKAGE.parent) / name
