# SPDX-License-Identifier: Apache-2.0
"""Who claims which address: an index over the Facts, kept up to date as Services come, change and go."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from lbagent.model.service import ServiceKey
from lbagent.plan.facts import Facts


@dataclass(slots=True)
class Register:
    """``claimants``: Services of ours by the address their status holds; ``contested``: by more than one.

    ``values``: the claimed addresses as integers, by family. ``foreign``: Services that are not ours
    but hold addresses. ``lingering``: those whose status holds more than they may keep. ``sharers``:
    those with a sharing key. ``unsettled``: those that lack something and may be given it.
    """

    facts: dict[ServiceKey, Facts] = field(default_factory=dict)
    claimants: dict[str, set[ServiceKey]] = field(default_factory=dict)
    contested: set[str] = field(default_factory=set)
    values: dict[int, set[int]] = field(default_factory=lambda: {4: set(), 6: set()})
    foreign: set[ServiceKey] = field(default_factory=set)
    lingering: set[ServiceKey] = field(default_factory=set)
    sharers: set[ServiceKey] = field(default_factory=set)
    unsettled: set[ServiceKey] = field(default_factory=set)

    def note(self, facts: Facts) -> None:
        """Take up a Service that is not in it."""
        key = facts.key
        self.facts[key] = facts
        for item in facts.claim.held:
            claimants = self.claimants.setdefault(item.address, set())
            claimants.add(key)
            self.values[item.family].add(item.value)
            if len(claimants) > 1:
                self.contested.add(item.address)
        for kind in self._kinds(facts):
            kind.add(key)

    def forget(self, key: ServiceKey) -> None:
        """Strike a Service out; nothing happens when it is not in it."""
        facts = self.facts.pop(key, None)
        if facts is None:
            return
        for item in facts.claim.held:
            claimants = self.claimants[item.address]
            claimants.discard(key)
            if len(claimants) < 2:
                self.contested.discard(item.address)
            if not claimants:
                del self.claimants[item.address]
                self.values[item.family].discard(item.value)
        for kind in self._kinds(facts):
            kind.discard(key)

    def _kinds(self, facts: Facts) -> Iterator[set[ServiceKey]]:
        if facts.foreign:
            if facts.service.ingress:
                yield self.foreign
            return
        if facts.claim.surplus or facts.claim.lost:
            yield self.lingering
        if facts.wish.sharing_key:
            yield self.sharers
        if may_be_given(facts) and not facts.is_settled:
            yield self.unsettled


def may_be_given(facts: Facts) -> bool:
    """May the allocator give it anything?"""
    return facts.foreign is None and facts.refusal is None and not facts.service.deleting
