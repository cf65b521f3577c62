"""What may stand in a request's URL."""

from __future__ import annotations

import re
import traceback

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from worker.modelarts import Endpoint, validate_pool_name, validate_project_id

NAME = "auto-pool-os-86c13962597848eeb29c5861153a391f"
PROJECT = "0123456789abcdef0123456789abcdef"
SECRET = "s3cr3t-passphrase"

patient = settings(deadline=None)

# Pool ids


@pytest.mark.parametrize(
    "text",
    [NAME, "a" * 36, "a" * 63, "a" + "-" * 34 + "1", "pool-" + "0" * 31],
)
def test_a_pool_id_is_taken_as_it_is(text: str) -> None:
    assert validate_pool_name(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * 35,
        "a" * 64,
        "1" + NAME,
        "-" + NAME,
        NAME + "-",
        NAME.upper(),
        NAME.replace("o", "O", 1),
        NAME + "\n",
        "\n" + NAME,
        NAME + " ",
        NAME + "\x00",
        NAME.replace("-", "_"),
        NAME.replace("-", "/"),
        NAME + "/../x",
        "../" + NAME,
        ".." * 20,
        NAME.replace("-", "%2F"),
        NAME + "%00",
        NAME + "?x=1",
        NAME + "#x",
        NAME + ";x",
        NAME.replace("-", "‐"),  # a hyphen, but not the hyphen
        NAME.replace("a", "а"),  # Cyrillic
        NAME.replace("o", "ο"),  # Greek
        NAME.replace("1", "１"),  # full width
        NAME.replace("1", "١"),  # Arabic
        NAME.replace("s", "ſ"),  # equal to s if case is ignored
    ],
    ids=ascii,
)
def test_what_is_no_pool_id_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"^Pool id .+ is not one; accepted: .+\.$") as caught:
        validate_pool_name(text)
    assert repr(text) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@patient
@given(st.text() | st.text("ab-0/.%A\n_", min_size=34, max_size=65))
def test_a_pool_id_that_is_taken_needs_no_quoting(text: str) -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789-")
    good = (
        36 <= len(text) <= 63
        and set(text) <= allowed
        and text[0] not in "0123456789-"
        and text[-1] != "-"
    )
    if not good:
        with pytest.raises(ValueError, match="Pool id"):
            validate_pool_name(text)
        return
    assert validate_pool_name(text) == text
    path = f"/v2/{PROJECT}/pools/{text}"
    assert URL(f"https://example.com{path}").raw_path == path


@patient
@given(st.from_regex(r"[a-z][a-z0-9-]{34,61}[a-z0-9]", fullmatch=True))
def test_every_pool_id_of_the_documented_form_is_taken(text: str) -> None:
    assert validate_pool_name(text) == text


# Project ids


@pytest.mark.parametrize("text", [PROJECT, "a", "A_b-9", "x" * 64])
def test_a_project_id_is_taken_as_it_is(text: str) -> None:
    assert validate_project_id(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-a",
        "_a",
        "x" * 65,
        "a/b",
        "..",
        ".",
        "a.b",
        "a%2Fb",
        "a b",
        "a\n",
        "ａ",
        "١",
        "a?b",
        "a\0",
    ],
    ids=ascii,
)
def test_what_is_no_project_id_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"^Project id .+ is not one; accepted: .+\.$") as caught:
        validate_project_id(text)
    assert repr(text) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# Endpoints


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://modelarts.example.com", "https://modelarts.example.com"),
        ("https://modelarts.example.com/", "https://modelarts.example.com"),
        (" https://modelarts.example.com\n", "https://modelarts.example.com"),
        ("HTTPS://ModelArts.Example.com", "https://modelarts.example.com"),
        ("https://modelarts.example.com:443", "https://modelarts.example.com"),
        ("https://modelarts.example.com:8443/", "https://modelarts.example.com:8443"),
        ("https://modelarts.example.com:1", "https://modelarts.example.com:1"),
        ("https://modelarts.example.com:65535", "https://modelarts.example.com:65535"),
        ("https://192.0.2.1", "https://192.0.2.1"),
        ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443"),
        ("https://bücher.example.com", "https://xn--bcher-kva.example.com"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://127.8.9.10:8080", "http://127.8.9.10:8080"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://LOCALHOST", "http://localhost"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("http://[0:0:0:0:0:0:0:1]:8080", "http://[::1]:8080"),
    ],
)
def test_a_base_url_is_read(text: str, url: str) -> None:
    assert Endpoint.parse(text).url == url


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a URL with a scheme and a host"),
        ("modelarts.example.com", "is not a URL with a scheme and a host"),
        ("//modelarts.example.com", "is not a URL with a scheme and a host"),
        ("https:", "is not a URL"),
        ("https://", "is not a URL"),
        ("https:///pools", "is not a URL"),
        ("https:modelarts.example.com", "is not a URL with a scheme and a host"),
        ("ftp://modelarts.example.com", "is not a URL with a scheme and a host"),
        ("file:///etc/passwd", "is not a URL"),
        ("javascript:alert(1)", "is not a URL"),
        ("https://modelarts.example.com/v2", "has more than a scheme, a host and a port"),
        ("https://modelarts.example.com//", "has more than a scheme, a host and a port"),
        ("https://modelarts.example.com?a=b", "has more than a scheme, a host and a port"),
        ("https://modelarts.example.com/#x", "has more than a scheme, a host and a port"),
        ("https://modelarts.example.com:0", "is not a URL"),
        ("https://modelarts.example.com:65536", "is not a URL"),
        ("https://modelarts.example.com:99999999999", "is not a URL"),
        ("https://modelarts.example.com:-1", "is not a URL"),
        ("https://modelarts.example.com:+80", "is not a URL"),
        ("https://modelarts.example.com:8_0", "is not a URL"),
        ("https://modelarts.example.com: 80", "is not a URL"),
        ("https://modelarts.example.com:٨٠", "is not a URL"),
        ("https://modelarts.example.com:https", "is not a URL"),
        ("https://[::1", "is not a URL"),
        ("https://[modelarts]", "is not a URL"),
        ("https://[::1%25eth0]", "is not a URL"),
        ("https://model arts.example.com", "is not a URL"),
        ("https://modelarts\n.example.com", "is not a URL"),
        ("https://modelarts\x00.example.com", "is not a URL"),
        ("https://modelarts%2eexample.com", "is not a URL"),
        ("https://modelarts\\.example.com", "is not a URL"),
        ("https://{endpoint}", "is not a URL"),
        ("https://<endpoint>", "is not a URL"),
        ("https://a\u202eb.example.com", "is not a URL"),
        ("http://modelarts.example.com", "is not encrypted"),
        ("http://192.0.2.1", "is not encrypted"),
        ("http://0.0.0.0", "is not encrypted"),
        ("http://[::]", "is not encrypted"),
        ("http://[2001:db8::1]", "is not encrypted"),
        ("http://localhost.example.com", "is not encrypted"),
        ("http://127.0.0.1.example.com", "is not encrypted"),
    ],
    ids=ascii,
)
def test_what_is_no_base_url_is_refused_in_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="; accepted: https://host or https://host:port") as caught:
        Endpoint.parse(text)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_http_is_taken_for_another_machine_only_if_the_user_says_so() -> None:
    text = "http://modelarts.example.com:8080"
    with pytest.raises(ValueError, match="http only for this machine or with POOLSWEEP_INSECURE"):
        Endpoint.parse(text)
    assert Endpoint.parse(text, insecure_http=True).url == text


@pytest.mark.parametrize(
    "text",
    [
        "https://user:{}@modelarts.example.com",
        "https://user:{}@modelarts.example.com:99999",
        "https://user:{}@modelarts.example.com/v2?a=b",
        "https://user:{}@",
        "https://:{}@modelarts.example.com",
        "https://{}@modelarts.example.com",
        "http://user:{}@modelarts.example.com",
        "http://user:{}@127.0.0.1:8080",
        "ftp://user:{}@modelarts.example.com",
        "user:{}@modelarts.example.com",
        "https:user:{}@modelarts.example.com",
        "https:/user:{}@modelarts.example.com",
        "https://user:{}@[::1",
        "https://user:a b{}@modelarts.example.com",
        "https://user:{}%40modelarts.example.com",
        "https://user:{}＠modelarts.example.com",
        "https://modelarts.example.com?token={}",
        "https://modelarts.example.com:99999?token={}",
        "https://modelarts.example.com/v2?token={}",
        "https://modelarts.example.com#{}",
        "modelarts.example.com?token={}",
    ],
)
@pytest.mark.parametrize("insecure_http", [False, True])
def test_a_secret_in_a_url_is_refused_and_not_repeated(text: str, insecure_http: bool) -> None:
    with pytest.raises(ValueError, match="accepted: https://host") as caught:
        Endpoint.parse(text.format(SECRET), insecure_http=insecure_http)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


authorities = st.text("ab.-:[]@%/?#0189\\ \n\u202eé＠", max_size=20)


@patient
@given(st.text() | st.builds("{}{}".format, st.sampled_from(["https://", "http://"]), authorities))
def test_an_endpoint_is_a_plain_origin_or_is_refused(text: str) -> None:
    refusal = ""
    try:
        url = Endpoint.parse(text, insecure_http=True).url
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert len(refusal.splitlines()) == 1
        return
    assert re.fullmatch(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?", url)
    assert Endpoint.parse(url, insecure_http=True).url == url
