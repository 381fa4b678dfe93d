# SPDX-License-Identifier: Apache-2.0
"""Everything that can go wrong on purpose.

LbagentError
├── ConfigError        the configuration file
├── KubeError          the Kubernetes API
│   ├── KubeUnavailable    no answer, try again
│   ├── KubeGone           410: list again
│   └── KubeRejected       the API said no
├── BgpError           ExaBGP or its relay
│   ├── SpeakerGone        no relay to talk to
│   └── RouteRefused       ExaBGP answered error
├── XdpError           the kernel side
│   ├── ProgramRejected    compiler or verifier, with its last lines
│   └── TableFull          a map has no room
├── ProbeError         a probe could not be made
└── ControlError       the control socket

Each room translates foreign exceptions at its door (``raise ... from``). ``hint`` is what the
operator does next. An expected refusal (no free address) is a Reason, not an exception.
"""


class LbagentError(Exception):
    """Root of the tree; ``hint`` says what the operator does next."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(LbagentError):
    """The configuration file. ``problems`` holds one line per mistake: ``file:line: key: message``."""

    def __init__(self, message: str, *, hint: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = problems


class KubeError(LbagentError):
    """The Kubernetes API."""


class KubeUnavailable(KubeError):
    """No answer in time, connection refused, 5xx: try again later."""


class KubeGone(KubeError):
    """410: the resource version is too old, list again."""


class KubeRejected(KubeError):
    """The API answered no. ``status`` is the HTTP status."""

    def __init__(self, message: str, *, hint: str = "", status: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class BgpError(LbagentError):
    """ExaBGP or its relay."""


class SpeakerGone(BgpError):
    """The relay does not answer."""


class RouteRefused(BgpError):
    """ExaBGP answered error to a command."""


class XdpError(LbagentError):
    """The kernel side."""


class ProgramRejected(XdpError):
    """Compiler or verifier said no."""


class TableFull(XdpError):
    """A map has no room."""


class ProbeError(LbagentError):
    """A probe could not be made."""


class ControlError(LbagentError):
    """The control socket."""
