# SPDX-License-Identifier: Apache-2.0
"""The documentation says what is: links lead somewhere, commands parse, keys exist, screens are real. Offline."""

import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from lbagent import config
from lbagent.cli import ctl, daemon
from lbagent.metrics import CATALOGUE
from lbagent.model.reason import Reason
from lbagent.xdp.verdict import Verdict
from tests import incidents
from tests.config.example import GOOD

CHECKOUT = Path(__file__).resolve().parent.parent
DOCS = CHECKOUT / "docs"
REFERENCE = DOCS / "reference"

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
TOOL = re.compile(r"(?:\$ |sudo |\S*/bin/)*(lbctl|lbagent) (.+)")
KEY = re.compile(r"(?:host|kubernetes|pools|bgp|xdp|probe|guard|http|log|paths)(?:\[\])?(?:\.[a-z0-9_]+(?:\[\])?)+")
ANNOTATION = re.compile(r"\"((?:lbagent|metallb)\.[a-z.]+/[a-zA-Z-]+|metallb\.universe\.tf/[a-zA-Z-]+)\"")
OTHERS = {"apiVersion", "metadata", "spec", "scrape_configs", "rule_files", "probes"}
"""Keys of YAML that other programs read."""
GENERATED = "<!-- Made by docs/generate.py"
TOOLS: Mapping[str, click.Group] = {"lbctl": ctl.main, "lbagent": daemon.main}


@cache
def pages() -> Mapping[Path, str]:
    """Every Markdown page for people."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listed.stdout.split() if listed.returncode == 0 else [str(p) for p in CHECKOUT.glob("docs/**/*.md")]
    return {path: path.read_text() for name in names if (path := CHECKOUT / name).exists()}


def prose(text: str) -> str:
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Names that GitHub gives to headings; a repeated one gets a number."""
    found: dict[str, int] = {}
    for title in HEADING.findall(prose(text)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if not n else f"{slug}-{n}" for slug, last in found.items() for n in range(last + 1)}


def test_every_link_and_anchor_leads_somewhere() -> None:
    dead = []
    for page, text in pages().items():
        for target in LINK.findall(prose(text)):
            name, _, anchor = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            there = (page.parent / name).resolve() if name else page
            known = there in pages() and anchors(pages()[there])
            if not there.exists() or (anchor and not (known and anchor in known)):
                dead.append(f"{page.relative_to(CHECKOUT)}: {target}")
    assert dead == []


def test_every_page_can_be_reached_from_the_first() -> None:
    reached, waiting = set[Path](), [DOCS / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page not in pages():
            continue
        reached.add(page)
        targets = (target.partition("#")[0] for target in LINK.findall(prose(pages()[page])))
        waiting += [(page.parent / target).resolve() for target in targets if target and "://" not in target]
    lost = {p for p in pages() if p.is_relative_to(DOCS)} - reached
    decisions = {p for p in lost if p.parent.name == "decisions"}  # their folder is linked
    assert sorted(str(p) for p in lost - decisions) == []


def command_lines() -> Iterator[tuple[str, str, list[str]]]:
    """(page, tool, arguments) of each command in a block or between backticks."""
    for page, text in pages().items():
        if GENERATED in text:
            continue
        lines = [line for kind, body in FENCE.findall(text) if kind in ("sh", "text") for line in body.splitlines()]
        for line in [*(line.strip() for line in lines), *(f"`{word}`" for word in INLINE.findall(prose(text)))]:
            if found := TOOL.fullmatch(line.strip("`")):
                words = shlex.split(re.split(r" [>|;&#]", found[2])[0])
                yield f"{page.relative_to(CHECKOUT)}: {line}", found[1], words


def parse(group: click.Group, name: str, words: list[str]) -> None:
    """As the tool would, but nothing is run. Raises click's errors."""
    context = group.make_context(name, list(words))
    if not context._protected_args:
        raise click.UsageError("no command")
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    if isinstance(command, click.Group):
        parse(command, str(name), rest)
    else:
        command.make_context(str(name), rest, parent=context)


def test_every_command_line_is_one_that_the_tools_take() -> None:
    wrong, tried = [], 0
    for where, tool, words in command_lines():
        tried += 1
        if words in ([], ["--version"], ["--help"]) or "..." in words:
            continue
        try:
            parse(TOOLS[tool], tool, words)
        except click.BadParameter as error:
            # Prose may name a command without all it needs, or with OS for one of several.
            is_prose = "`" in where and (isinstance(error, click.MissingParameter) or any(map(str.isupper, words)))
            if not is_prose:
                wrong.append(f"{where}: {error.format_message()}")
        except click.ClickException as error:
            wrong.append(f"{where}: {error.format_message()}")
        except click.exceptions.Exit:
            pass
    assert wrong == []
    assert tried > 50


def yaml_blocks() -> Iterator[tuple[str, Any]]:
    for page, text in pages().items():
        for kind, body in FENCE.findall(text):
            if kind == "yaml":
                yield str(page.relative_to(CHECKOUT)), yaml.safe_load(body)


def merged(base: Any, part: Any) -> Any:
    """A fragment laid over a whole file: mappings merge, all else is replaced."""
    if isinstance(base, dict) and isinstance(part, dict):
        return base | {key: merged(base.get(key), value) for key, value in part.items()}
    return part


def test_every_piece_of_configuration_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbagent.config.rules.read_password", lambda _path: "key")
    base = yaml.safe_load(GOOD)
    base["pools"] = [{"name": "default", "addresses": ["192.0.2.0/28"]}]
    tried = 0
    for where, part in yaml_blocks():
        if isinstance(part, dict) and not part.keys() & OTHERS:
            tried += 1
            config.parse(yaml.safe_dump(merged(base, part)), name=where)
    assert tried > 5


@cache
def keys() -> frozenset[str]:
    """Every path in the reference: ``bgp.peers[].address``."""
    found, section = set(), ""
    for line in (REFERENCE / "config.md").read_text().splitlines():
        if heading := re.fullmatch(r"## `(.+)`", line):
            section = f"{heading[1]}."
            found.add(heading[1])
        elif row := re.match(r"\| `(\w+)` \|", line):
            found.add(section + row[1])
    return frozenset(found | {key.replace("[]", "") for key in found})


def test_every_key_between_backticks_exists() -> None:
    unknown = [
        f"{page.relative_to(CHECKOUT)}: {word}"
        for page, text in pages().items()
        for word in INLINE.findall(prose(text))
        if KEY.fullmatch(word) and word not in keys() and not (page.parent / word).exists() and not word.endswith(".py")
    ]
    assert unknown == []


def test_every_annotation_is_described() -> None:
    described = (REFERENCE / "services.md").read_text()
    for source in (CHECKOUT / "lbagent" / "plan").glob("*.py"):
        for name in ANNOTATION.findall(source.read_text()):
            prefix, _, word = name.partition("/")
            if word[:1].islower():  # capital ones are words in the status
                assert f"`{name}`" in described or (prefix != "lbagent.io" and f"`{word}`" in described), name


def test_every_drop_has_advice() -> None:
    advice = (DOCS / "how-to" / "read-a-drop.md").read_text()
    assert [v.word for v in Verdict if v.is_drop and f"`{v.word}`" not in advice] == []


def test_the_page_on_modes_names_those_that_a_host_offers() -> None:
    text = (DOCS / "how-to" / "choose-a-mode.md").read_text()
    offered = re.search(r"By default a host offers: (.+?)\.\*\*", text)
    assert offered
    assert set(INLINE.findall(offered[1])) == {str(mode) for mode in config.parse(GOOD).settings().modes}


def test_the_screens_of_the_incidents_are_what_lbctl_prints() -> None:
    """After a change of a screen: python -m tests.incidents."""
    page = incidents.PAGE.read_text()
    assert {match["name"] for match in incidents.SCREEN.finditer(page)} == set(incidents.screens())
    assert incidents.rewritten(page) == page


def test_man_pages_hold_no_troff_but_ours() -> None:
    names = {path.name for path in (DOCS / "man").iterdir()}
    assert names == {"lbagent.8", "lbctl.8", "lbagent.yaml.5"}
    requests = {".TH", ".SH", ".SS", ".TP", ".B", ".br", ".nh", ".ad"}
    for path in (DOCS / "man").iterdir():
        for line in path.read_text().splitlines():
            if line.startswith((".", "'")) and not line.startswith('.\\"'):
                assert line.split()[0] in requests, f"{path.name}: {line}"


def test_every_word_with_underscores_is_one_of_ours() -> None:
    """Reasons, verdicts, keys, metrics and variables of the roles: a typo is none of them."""
    known = {str(reason.value) for reason in Reason} | {verdict.word for verdict in Verdict}
    known |= {spec.name for spec in CATALOGUE} | {key.rpartition(".")[2] for key in keys()}
    known |= set(
        re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", (CHECKOUT / "ansible/roles/lbagent/meta/argument_specs.yml").read_text())
    )
    known |= OTHERS | {"preferred_lft"}  # words of others
    strange = [
        f"{page.relative_to(CHECKOUT)}: {word}"
        for page, text in pages().items()
        if page.is_relative_to(DOCS) and GENERATED not in text
        for word in INLINE.findall(prose(text))
        if re.fullmatch(r"[a-z]+(_[a-z]+)+", word) and not word.startswith("test_") and word not in known
    ]
    assert strange == []
