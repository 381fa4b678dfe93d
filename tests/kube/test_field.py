# SPDX-License-Identifier: Apache-2.0
"""Reading one field: defaults when unset, a complaint with its path when wrong."""

import datetime
from collections.abc import Callable

import pytest

from lbagent.kube.field import Field, Unreadable
from lbagent.model.service import IpMode


def test_an_unset_or_null_field_has_its_default() -> None:
    for value in ({}, {"a": None}):
        field = Field(value)
        assert field.text("a", default="x") == "x"
        assert field.number("a", default=7) == 7
        assert field.flag("a", default=True) is True
        assert field.texts("a") == ()
        assert field.texts_by_key("a") == {}
        assert field.children("a") == []
        assert field.child("a").child("b").text("c") == ""
        assert field.word("a", IpMode) is None
        assert field.time("a") == 0.0
        assert field.address("a", default="") == ""
        assert field.first_address("a") == ""
        assert "a" not in field


@pytest.mark.parametrize(
    ("read", "complaint"),
    [
        (lambda f: f.child("spec").text("name"), "spec.name is 5, not text"),
        (lambda f: f.child("spec").number("flag"), "spec.flag is True, not a whole number"),
        (lambda f: f.child("spec").flag("name", default=True), "spec.name is 5, not true or false"),
        (lambda f: f.child("spec").children("list")[1].text("x"), "spec.list[1] is 'no', not an object"),
        (lambda f: f.child("spec").texts("list"), "spec.list[0] is {}, not text"),
        (lambda f: f.child("spec").texts("name"), "spec.name is 5, not a list"),
        (lambda f: f.child("spec").texts_by_key("map"), "spec.map.k is 1, not text"),
        (lambda f: f.child("list"), "list is [], not an object"),
        (lambda f: f.text("none", required=True), "none is None, not text"),
        (lambda f: f.number("none", required=True), "none is None, not a whole number"),
        (lambda f: f.child("spec").word("mode", IpMode), "spec.mode is 'Odd', not one of VIP, Proxy"),
        (lambda f: f.child("spec").address("mode"), "spec.mode is 'Odd', not an IP address"),
        (lambda f: f.child("spec").time("mode"), "spec.mode is 'Odd', not a time"),
        (lambda f: f.child("spec").time("name"), "spec.name is 5, not a time"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(read: Callable[[Field], object], complaint: str) -> None:
    whole = {"spec": {"name": 5, "flag": True, "list": [{}, "no"], "map": {"k": 1}, "mode": "Odd"}, "list": []}
    with pytest.raises(Unreadable) as caught:
        read(Field(whole))
    assert caught.value.message == complaint


def test_a_long_wrong_value_is_cut_in_the_complaint() -> None:
    with pytest.raises(Unreadable) as caught:
        Field({"a": ["x" * 500]}).text("a")
    assert len(caught.value.message) < 100


def test_addresses_are_canonical_text() -> None:
    assert Field({"ip": "2001:DB8:0::1"}).address("ip") == "2001:db8::1"
    assert Field({"ips": ["2001:DB8::0:1", "10.0.0.1"]}).first_address("ips") == "2001:db8::1"


def test_times_are_read_from_json_and_from_what_a_yaml_reader_makes_of_them() -> None:
    at = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    for value in ("2026-01-01T00:00:00Z", at, at.replace(tzinfo=None)):
        assert Field({"t": value}).time("t") == at.timestamp()
