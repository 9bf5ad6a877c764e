import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telephony.twilio import connect_document, hangup_request, reject_document, sign, signature_valid

VECTORS = json.loads((Path(__file__).parents[1] / "fixtures" / "signature-vectors.json").read_text())
WEBHOOK = VECTORS["twilio_webhook"]
TOKEN: str = WEBHOOK["token"]
URL: str = WEBHOOK["url"]
PARAMS: dict[str, str] = WEBHOOK["params"]
SIGNATURE: str = WEBHOOK["sig"]
STREAM_URL: str = VECTORS["twilio_ws"]["url"]
STREAM_SIGNATURE: str = VECTORS["twilio_ws"]["sig"]


def test_the_webhook_vector_of_twilios_own_library_verifies() -> None:
    assert sign(TOKEN, URL, PARAMS) == SIGNATURE
    assert signature_valid(TOKEN, URL, PARAMS, SIGNATURE)


def test_the_order_in_which_fields_arrive_does_not_matter() -> None:
    assert signature_valid(TOKEN, URL, list(reversed(PARAMS.items())), SIGNATURE)


def test_the_upgrade_vector_verifies_without_parameters() -> None:
    assert signature_valid(TOKEN, STREAM_URL, (), STREAM_SIGNATURE)
    assert signature_valid(TOKEN, STREAM_URL, {}, STREAM_SIGNATURE)


@pytest.mark.parametrize("at", range(len(SIGNATURE)))
def test_a_signature_with_one_byte_changed_is_false(at: int) -> None:
    forged = SIGNATURE[:at] + chr(ord(SIGNATURE[at]) ^ 1) + SIGNATURE[at + 1 :]

    assert not signature_valid(TOKEN, URL, PARAMS, forged)


@pytest.mark.parametrize("signature", [None, "", "é", "\udce9", SIGNATURE + "=", SIGNATURE.lower(), STREAM_SIGNATURE])
def test_a_missing_or_foreign_signature_is_false(signature: str | None) -> None:
    assert not signature_valid(TOKEN, URL, PARAMS, signature)


@pytest.mark.parametrize(("one", "other"), list(pairwise(PARAMS)))
def test_values_that_change_places_are_noticed(one: str, other: str) -> None:
    assert not signature_valid(TOKEN, URL, PARAMS | {one: PARAMS[other], other: PARAMS[one]}, SIGNATURE)


@pytest.mark.parametrize("name", PARAMS)
def test_a_changed_added_or_missing_field_is_noticed(name: str) -> None:
    assert not signature_valid(TOKEN, URL, PARAMS | {name: PARAMS[name] + "0"}, SIGNATURE)
    assert not signature_valid(TOKEN, URL, PARAMS | {name + "2": ""}, SIGNATURE)
    assert not signature_valid(TOKEN, URL, {key: PARAMS[key] for key in PARAMS if key != name}, SIGNATURE)


@pytest.mark.parametrize(
    "url", [URL + "/", URL + "?a=1", URL.replace("https", "http"), URL.replace("voice.", "vioce."), STREAM_URL]
)
def test_another_address_is_noticed(url: str) -> None:
    assert not signature_valid(TOKEN, url, PARAMS, SIGNATURE)


def test_another_accounts_token_is_noticed() -> None:
    assert not signature_valid(TOKEN[:-1] + "0", URL, PARAMS, SIGNATURE)


def test_an_empty_token_checks_nothing_and_says_so() -> None:
    with pytest.raises(ValueError, match="auth token is empty"):
        signature_valid("", URL, PARAMS, SIGNATURE)


def with_port(url: str, port: int) -> str:
    return url.replace("example.com", f"example.com:{port}")


@pytest.mark.parametrize("url", [URL, STREAM_URL, "https://voice.example.com", "wss://voice.example.com/a?b=c:80/"])
def test_the_default_port_may_be_written_out_on_either_side(url: str) -> None:
    written = with_port(url, 443)

    assert signature_valid(TOKEN, written, PARAMS, sign(TOKEN, url, PARAMS))
    assert signature_valid(TOKEN, url, PARAMS, sign(TOKEN, written, PARAMS))


def test_the_wrong_port_that_a_vendor_library_writes_for_upgrades_is_false() -> None:
    variant: str = VECTORS["twilio_ws_sdk_port_variant"]

    assert not signature_valid(TOKEN, STREAM_URL, (), sign(TOKEN, variant))
    assert not signature_valid(TOKEN, variant, (), STREAM_SIGNATURE)


def test_a_port_of_ones_own_has_to_be_the_same() -> None:
    own = with_port(URL, 8443)

    assert signature_valid(TOKEN, own, PARAMS, sign(TOKEN, own, PARAMS))
    assert not signature_valid(TOKEN, own, PARAMS, SIGNATURE)
    assert signature_valid(TOKEN, "https://[::1]:443/a", (), sign(TOKEN, "https://[::1]/a"))


def test_a_name_given_twice_counts_each_value_once_in_order() -> None:
    once = [("Digits", "1"), ("Digits", "2")]

    assert sign(TOKEN, URL, [("Digits", "2"), ("Digits", "1"), ("Digits", "2")]) == sign(TOKEN, URL, once)
    assert sign(TOKEN, URL, once) != sign(TOKEN, URL, once[:1])


def stream_of(document: str) -> ElementTree.Element:
    stream = ElementTree.fromstring(document.encode()).find("Connect/Stream")
    assert stream is not None
    return stream


def test_the_answer_connects_the_call_to_the_stream() -> None:
    stream = stream_of(
        connect_document(STREAM_URL, {"persona": "operator", "from": "+15550100001"}, "https://voice.example.com/s?a=1")
    )

    assert stream.attrib == {
        "url": STREAM_URL,
        "statusCallback": "https://voice.example.com/s?a=1",
        "statusCallbackMethod": "POST",
    }
    assert [(one.get("name"), one.get("value")) for one in stream] == [
        ("persona", "operator"),
        ("from", "+15550100001"),
    ]


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["C"]), max_size=20), st.text(st.characters(exclude_categories=["C"]))
    )
)
def test_what_a_caller_calls_himself_stays_inside_his_attribute(parameters: dict[str, str]) -> None:
    stream = stream_of(connect_document(STREAM_URL, parameters, URL))

    assert {one.get("name"): one.get("value") for one in stream} == parameters


def test_an_injected_verb_is_only_text() -> None:
    name = "\"/><Hangup/>'\n\t&lt;"

    document = connect_document(STREAM_URL, {"caller": name}, URL)

    assert "<Hangup" not in document
    assert stream_of(document)[0].get("value") == name


@given(st.text(max_size=400))
def test_any_text_at_all_makes_a_document_that_can_be_read(value: str) -> None:
    assert len(stream_of(connect_document(STREAM_URL, {"caller": value}, URL))) == 1


def test_what_xml_cannot_carry_is_replaced() -> None:
    assert (
        stream_of(connect_document(STREAM_URL, {"caller": "a\x00b\ud800c"}, URL))[0].get("value") == "a\ufffdb\ufffdc"
    )


@pytest.mark.parametrize("url", ["wss://voice.example.com/m?token=1", "wss://voice.example.com/m#a", URL, "voice"])
def test_a_stream_address_that_twilio_refuses_is_refused_here(url: str) -> None:
    with pytest.raises(ValueError, match="stream URL"):
        connect_document(url, {}, URL)


def test_a_parameter_of_500_characters_is_refused_and_one_of_499_is_not() -> None:
    connect_document(STREAM_URL, {"from": "x" * 495}, URL)

    with pytest.raises(ValueError, match="'from': name and value have 500 characters; Twilio takes 499 or fewer"):
        connect_document(STREAM_URL, {"from": "x" * 496}, URL)


def test_a_busy_line_is_rejected_as_busy() -> None:
    assert ElementTree.fromstring(reject_document().encode()).find("Reject[@reason='busy']") is not None


def test_hanging_up_is_a_request_as_data() -> None:
    request = hangup_request("AC01", "CA/../02")

    assert request.method == "POST"
    assert request.url == "https://api.twilio.com/2010-04-01/Accounts/AC01/Calls/CA%2F..%2F02.json"
    assert request.form == {"Status": "completed"}
    assert {200, 404} <= request.done_statuses
