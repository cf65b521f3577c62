"""The clients' file: who they are, what is wrong with it, and that no token is repeated."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.file_watch import FileWatch
from scheduler.intake import clients
from scheduler.intake.addresses import Host
from scheduler.intake.clients import Clients, new_token, token_hash
from scheduler.intake.request import Way
from scheduler.policy import Brakes
from worker.limiter import Quota
from worker.yaml_source import YamlError

if TYPE_CHECKING:
    from pathlib import Path

PROJECT = "0123456789abcdef0123456789abcdef"
# Fixed, so that tests have the same names in every process.
TOKEN, OTHER_TOKEN = f"pst_{'a1B-' * 10}xyz", f"pst_{'_c2D' * 10}xyz"
HASH, OTHER_HASH = token_hash(TOKEN), token_hash(OTHER_TOKEN)
WHOLE = f"""
clients:
  ci:
    tokens: [{HASH}, {OTHER_HASH.upper()}]
    projects: [{PROJECT}]
    ways: [http, stream]
    brakes:
      max_deletions: 200
      quiet: [{{from: 08:00, to: 18:00}}]
    timezone: Europe/Berlin
    rate_limit: 0.5
    rate_burst: 3
    allow_busy: true
    allow_shared: true
    webhooks:
      hosts: [hooks.example.com, "[::1]:8443"]
      allow_private: true
      secret: {{env: CI_WEBHOOK_SECRET}}
  nightly:
    projects: [{PROJECT}, other]
    ways: [celery]
"""


def entry(**changes: Any) -> dict[str, Any]:
    return {"tokens": [HASH], "projects": [PROJECT], **changes}


def parse(**entries: dict[str, Any]) -> Clients:
    return clients.parse(json.dumps({"clients": entries}))


def said(text: str) -> list[str]:
    with pytest.raises(YamlError) as caught:
        clients.parse(text, "clients.yaml")
    # A traceback shows what an error came of: nothing that holds what was in the file.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return caught.value.sentences


def said_of(**changes: Any) -> str:
    """What is said of one client with one mistake."""
    (sentence,) = said(json.dumps({"clients": {"ci": entry(**changes)}}))
    return sentence.removeprefix("clients.yaml:1: ")


def test_a_file_is_read_with_all_that_it_says() -> None:
    found = clients.parse(WHOLE)
    ci, nightly = found
    assert (ci.name, nightly.name) == ("ci", "nightly")
    assert found.by_name("ci") is ci
    assert found.by_name("CI") is None
    assert ci.projects == [PROJECT]
    assert ci.ways == [Way.HTTP, Way.STREAM]
    assert ci.brakes.max_deletions == 200
    assert ci.brakes.model_fields_set == {"max_deletions", "quiet"}
    assert ci.zone.key == "Europe/Berlin"
    assert ci.quota == Quota(0.5, 3)
    assert (ci.allow_busy, ci.allow_shared) == (True, True)
    assert ci.webhooks is not None
    assert ci.webhooks.hosts == [Host("hooks.example.com"), Host("::1", 8443)]
    assert ci.webhooks.allow_private


def test_what_is_left_out_is_as_careful_as_can_be() -> None:
    (client,) = parse(ci=entry())
    assert client.ways == [Way.HTTP]
    assert client.brakes == Brakes()
    assert client.timezone == "UTC"
    assert client.quota == Quota(5, 20)
    assert not client.allow_busy
    assert not client.allow_shared
    assert client.webhooks is None


def test_quotas_are_by_the_clients_names() -> None:
    assert clients.parse(WHOLE).quotas == {"ci": Quota(0.5, 3), "nightly": Quota(5, 20)}


def test_a_host_may_be_private_if_the_file_says_so_of_it() -> None:
    found = parse(
        a=entry(webhooks={"hosts": ["inside:80"], "allow_private": True}),
        b=entry(tokens=[OTHER_HASH], webhooks={"hosts": ["outside"]}),
    )
    assert found.may_be_private("inside")
    assert not found.may_be_private("outside")
    assert not found.may_be_private("elsewhere")


# Tokens


def test_a_token_is_256_random_bits_behind_a_prefix() -> None:
    made = {new_token()[0] for _ in range(100)}
    assert len(made) == 100
    assert all(token.startswith("pst_") and len(token) == len("pst_") + 43 for token in made)


def test_a_tokens_hash_is_its_sha_256() -> None:
    assert HASH == token_hash(TOKEN) == hashlib.sha256(TOKEN.encode()).hexdigest()


def test_a_client_is_known_by_any_of_its_tokens() -> None:
    third, third_hash = new_token()
    found = parse(ci=entry(tokens=[HASH, OTHER_HASH]), dev=entry(tokens=[third_hash.upper()]))
    for token, name in ((TOKEN, "ci"), (OTHER_TOKEN, "ci"), (third, "dev")):
        client = found.authenticate(token)
        assert client is not None
        assert client.name == name


@pytest.mark.parametrize(
    "token",
    [
        "",
        HASH,
        TOKEN[:-1],
        f"{TOKEN}=",
        f"{TOKEN} ",
        f"{TOKEN}\n",
        f"Bearer {TOKEN}",
        TOKEN.removeprefix("pst_"),
        TOKEN.upper(),
        OTHER_TOKEN,
        "\ud800",
    ],
)
def test_nothing_else_is_a_token(token: str) -> None:
    assert parse(ci=entry()).authenticate(token) is None


@given(st.text())
def test_no_text_is_taken_for_a_token_by_accident(text: str) -> None:
    assert parse(ci=entry()).authenticate(text) is None


@pytest.mark.parametrize("word", ["correct horse battery staple", "pst_hunter2", "pst_"])
def test_what_can_be_guessed_is_no_token_even_if_its_hash_is_in_the_file(word: str) -> None:
    assert parse(ci=entry(tokens=[token_hash(word)])).authenticate(word) is None


# Mistakes


@pytest.mark.parametrize("token", [TOKEN, f" {TOKEN}", "pst_short", TOKEN.lower()])
def test_a_token_where_its_hash_belongs_is_pointed_out_and_not_repeated(token: str) -> None:
    assert said_of(tokens=[token]) == (
        "clients.ci.tokens[0]: this is a token, not its SHA-256; make a new one, since whoever "
        "can read this file knows it, and write down the new one's hash"
    )


@pytest.mark.parametrize("value", [HASH[:-1], f"sha256:{HASH}", f"{HASH}0", "g" * 64, "hunter2"])
def test_what_is_no_hash_is_refused_and_not_repeated(value: str) -> None:
    sentence = said_of(tokens=[value])
    assert sentence == "clients.ci.tokens[0]: accepted: a token's SHA-256, 64 hex digits"


@pytest.mark.parametrize(
    "tokens", [TOKEN, {TOKEN: HASH}, {HASH: None}, [[TOKEN]], [{TOKEN: 1}], [None], [12345678]]
)
def test_no_other_form_has_a_token_or_a_hash_repeated(tokens: Any) -> None:
    sentence = said_of(tokens=tokens)
    assert sentence.startswith("clients.ci.tokens")
    for secret in (TOKEN, HASH, "12345678"):
        assert secret not in sentence


def test_a_token_under_a_name_that_is_none_is_not_repeated() -> None:
    sentence = said_of(token=TOKEN)
    assert sentence.startswith("clients.ci.token: there is no such field; accepted: ")
    assert TOKEN not in sentence


def test_the_hash_of_an_empty_text_is_refused() -> None:
    nothing = hashlib.sha256(b"").hexdigest()
    assert "SHA-256 of an empty text" in said_of(tokens=[nothing])


def test_a_hash_that_is_there_twice_is_refused_wherever_it_is_and_not_repeated() -> None:
    text = f"""
clients:
  ci:
    tokens:
      - {HASH}
      - {HASH}
    projects: [{PROJECT}]
  dev:
    tokens: [{HASH.upper()}]
    projects: [{PROJECT}]
"""
    assert said(text) == [
        "clients.yaml:6: clients.ci.tokens[1]: client ci has this hash already",
        "clients.yaml:9: clients.dev.tokens[0]: client ci has this hash already",
    ]


def test_a_client_that_comes_by_http_needs_a_token_and_others_none() -> None:
    assert said_of(tokens=[]).startswith("clients.ci.tokens: a client that comes by http needs")
    (sentence,) = said(json.dumps({"clients": {"ci": {"projects": [PROJECT]}}}))
    assert "clients.ci: a client that comes by http needs a token" in sentence
    (client,) = parse(ci={"projects": [PROJECT], "ways": ["celery", "stream"]})
    assert client.tokens == []


def test_a_host_is_private_for_all_clients_or_for_none() -> None:
    text = f"""
clients:
  a:
    tokens: [{HASH}]
    projects: [{PROJECT}]
    webhooks: {{hosts: [one, two]}}
  b:
    tokens: [{OTHER_HASH}]
    projects: [{PROJECT}]
    webhooks:
      hosts:
        - three
        - TWO:8443
      allow_private: true
"""
    (sentence,) = said(text)
    assert sentence == (
        "clients.yaml:13: clients.b.webhooks.hosts[1]: client a has it with another "
        "allow_private; accepted: the same"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"projects": []}, "clients.ci.projects: it must not be empty"),
        ({"projects": ["a", "a"]}, "clients.ci.projects: a: there twice"),
        ({"projects": ["no/id"]}, "clients.ci.projects[0]: 'no/id' is not accepted: project id"),
        ({"projects": [5]}, "clients.ci.projects[0]: 5 is not accepted: a text is needed"),
        ({"ways": ["ftp"]}, "clients.ci.ways[0]: 'ftp' is not accepted: input should be 'http'"),
        ({"ways": ["stream", "stream"]}, "clients.ci.ways: stream: there twice"),
        ({"ways": []}, "clients.ci.ways: it must not be empty"),
        ({"brakes": {"max": 1}}, "clients.ci.brakes.max: there is no such field; accepted: max_d"),
        ({"timezone": "Nowhere"}, "clients.ci.timezone: 'Nowhere' is not accepted: no such time"),
        ({"rate_limit": 0}, "clients.ci.rate_limit: 0 is not accepted: input should be greater"),
        ({"rate_burst": 0}, "clients.ci.rate_burst: 0 is not accepted: input should be greater"),
        ({"name": "ci"}, "clients.ci.name: there is no such field; accepted: allow_busy"),
        ({"webhooks": {"hosts": []}}, "clients.ci.webhooks.hosts: it must not be empty"),
        (
            {"webhooks": {"hosts": ["0x7f.1"]}},
            "clients.ci.webhooks.hosts[0]: '0x7f.1' is not accepted; accepted: IPv4 addresses as",
        ),
        ({"webhooks": {"hosts": [1]}}, "clients.ci.webhooks.hosts[0]: 1 is not accepted: a text"),
        (
            {"webhooks": {"hosts": ["h"], "secret": "hunter2"}},
            "clients.ci.webhooks.secret: a secret is not written here; accepted: {env: NAME}",
        ),
    ],
)
def test_a_mistake_is_told_with_its_field_its_value_and_what_is_accepted(
    changes: dict[str, Any], expected: str
) -> None:
    sentence = said_of(**changes)
    assert sentence.startswith(expected)
    assert "hunter2" not in sentence


def test_a_url_where_a_host_belongs_is_not_repeated_since_it_may_hold_a_password() -> None:
    sentence = said_of(webhooks={"hosts": ["https://me:hunter2@hooks.example.com"]})
    assert "accepted: a host name" in sentence
    assert "hunter2" not in sentence


@pytest.mark.parametrize("text", ["", "clients:", "clients: {}", "clients: []", "{}", "[]"])
def test_a_file_without_clients_is_refused(text: str) -> None:
    assert said(text)


def test_a_name_that_may_not_be_one_is_refused() -> None:
    assert said(json.dumps({"clients": {"ci:prod": entry()}}))


def test_all_mistakes_are_told_at_once_each_with_its_line() -> None:
    text = f"clients:\n  a:\n    tokens: [{TOKEN}]\n    projects: []\n  b: {{ways: [ftp]}}\n"
    sentences = said(text)
    lines = [sentence.split(":")[1] for sentence in sentences]
    assert lines == sorted(lines)
    assert {"3", "4", "5"} == set(lines)


def test_nothing_shown_of_clients_holds_a_hash_or_a_secrets_place() -> None:
    found = clients.parse(WHOLE)
    shown = f"{found!r} {list(found)!r} {list(map(str, found))}"
    assert "ci" in shown
    assert HASH not in shown
    assert OTHER_HASH not in shown


def test_a_file_that_changes_is_watched_and_keeps_nobody_whose_token_is_gone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "clients.yaml"
    path.write_text(json.dumps({"clients": {"ci": entry()}}))
    watch = FileWatch(path, clients.load)
    assert watch.current.authenticate(TOKEN) is not None
    path.write_text(json.dumps({"clients": {"ci": entry(tokens=[OTHER_HASH])}}, indent=1))
    assert any(watch.look() for _ in range(2))
    assert watch.current.authenticate(TOKEN) is None
    assert watch.current.authenticate(OTHER_TOKEN) is not None
    path.write_text(json.dumps({"clients": {"ci": entry(tokens=[TOKEN])}}))
    with pytest.raises(YamlError):
        [watch.look() for _ in range(2)]
    assert watch.current.authenticate(OTHER_TOKEN) is not None
    assert TOKEN not in watch.rejected
