# SPDX-License-Identifier: Apache-2.0
"""The tree of errors is the one that its docstring draws."""

import inspect

from lbagent import errors


def test_every_error_is_drawn_in_the_tree_and_has_one_root() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    assert all(issubclass(c, errors.LbagentError) for c in classes)
    assert all(c.__name__ in (errors.__doc__ or "") for c in classes)


def test_the_hint_follows_the_message() -> None:
    assert str(errors.XdpError("no bpffs", hint="mount it")) == "no bpffs (mount it)"
    assert str(errors.XdpError("no bpffs")) == "no bpffs"
