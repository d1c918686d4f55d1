"""What requests may say: every field is honoured or refused by name; no body makes the server fail."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bc2_jax.serve.bodies import Limits
from bc2_jax.serve.errors import ApiError
from bc2_jax.serve.schema import chat_fields, completion_fields, decode_json, read_chat, read_completion
from tests.serve.conftest import Running

LIMITS = Limits()
ASK = {"messages": [{"role": "user", "content": "hi"}]}


def refused(read, body: dict, param: str | None, message: str, code: str = "invalid_value") -> None:
    with pytest.raises(ApiError) as error:
        read(body, LIMITS)
    assert (error.value.status, error.value.param, error.value.code) == (400, param, code)
    assert message in error.value.message and error.value.message.endswith((".", "?")), error.value.message


BAD = {
    "temperature": [-0.1, "1", True, [], 1e31], "top_p": [0, 1.1, "1"], "top_k": [-1, 1.5, True, 2**31],
    "repetition_penalty": [0, -1], "presence_penalty": [2.1, -2.1], "frequency_penalty": [3], "min_tokens": [-1],
    "max_tokens": [0, -1, 1.0, "9"], "max_completion_tokens": [0], "n": [0, 9, True], "seed": [-1, 2**32, 1.5],
    "stop": ["", [""], ["a", 1], ["a"] * 17, "a" * 129, 7, {}], "stop_token_ids": [[1.0], 5, [True], list(range(17))],
    "ignore_eos": [1, "true"], "stream": ["yes", 1], "stream_options": [True, []],
    "logprobs": [1], "user": [5, "a" * 513],
    "top_logprobs": [-1, 21], "logit_bias": [[], {"a": 1}, {"5": 101}, {"5": "1"}, {"05": 1}, {"-1": 1}, {"5": True},
                                             {"<reserved_106>": 5}, {"１": 1}, {str(i): 1 for i in range(301)}],
    "messages": [[], {}, "hi", [ASK["messages"][0]] * 501], "model": [7],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_values_that_are_not_legal(name):
    for value in BAD[name]:
        refused(read_chat, {**ASK, name: value}, name, f"{name} = ")
    assert read_chat({**ASK, name: None}, LIMITS) if name != "messages" else True


UNSUPPORTED = {
    "tools": [[{}], "x"], "tool_choice": ["required", {}], "response_format": [{"type": "json_object"}, {}],
    "store": [True],
    "functions": [[{}]], "function_call": [{"name": "f"}], "modalities": [["audio"]], "reasoning_effort": ["high"],
    "service_tier": ["flex"], "metadata": [{"a": "b"}], "audio": [{}], "prediction": [{}], "verbosity": ["low"],
    "prompt_cache_key": ["k"], "web_search_options": [{}], "min_p": [0.1], "use_beam_search": [True],
    "skip_special_tokens": [False],
    "include_stop_str_in_output": [True],
}  # fmt: skip
NEUTRAL = {
    "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False, "modalities": ["text"],
    "metadata": {}, "service_tier": "auto", "min_p": 0, "parallel_tool_calls": True, "skip_special_tokens": True,
}  # fmt: skip


def test_what_is_not_supported_is_refused_unless_it_asks_for_nothing():
    for name, values in UNSUPPORTED.items():
        for value in values:
            refused(read_chat, {**ASK, name: value}, name, "does not support", "unsupported_value")
    assert read_chat({**ASK, **NEUTRAL}, LIMITS) == read_chat({**ASK, **dict.fromkeys(UNSUPPORTED)}, LIMITS)


def test_every_field_of_openais_types_is_known():
    """Those of the client's own request types, so that no new one is unknown without a decision."""
    from openai.types import completion_create_params as completion
    from openai.types.chat import completion_create_params as chat

    for types, fields in ((chat, chat_fields(LIMITS)), (completion, completion_fields(LIMITS))):
        names = {
            name
            for kind in ("CompletionCreateParamsBase", "CompletionCreateParamsStreaming")
            for name in getattr(types, kind).__annotations__
        }
        assert names <= set(fields), names - set(fields)


def test_unknown_fields_have_a_suggestion():
    refused(read_chat, {**ASK, "max_token": 5}, "max_token", "did you mean 'max_tokens'?", "unknown_field")
    refused(read_chat, {**ASK, "zzzzzz": 5}, "zzzzzz", "'zzzzzz' is not a field", "unknown_field")
    refused(
        read_chat,
        {**ASK, "stream": True, "stream_options": {"usage": 1}},
        "stream_options.usage",
        "include_usage",
        "unknown_field",
    )
    refused(read_chat, {**ASK, "echo": True}, "echo", "is not a field", "unknown_field")
    refused(read_completion, {"prompt": "a", "messages": []}, "messages", "is not a field", "unknown_field")


def test_fields_that_need_each_other():
    refused(read_chat, {}, "messages", "messages is missing", "missing_field")
    refused(read_chat, {**ASK, "top_logprobs": 2}, "top_logprobs", "without logprobs")
    refused(read_chat, {**ASK, "stream_options": {}}, "stream_options", "without stream")
    refused(read_completion, {}, "prompt", "prompt is missing", "missing_field")
    refused(read_completion, {"prompt": "a", "best_of": 2}, "best_of", "must be n = 1", "unsupported_value")
    refused(read_completion, {"prompt": "a", "max_tokens": 0}, "max_tokens", "without echo")
    refused(read_completion, {"prompt": ["a"] * 64, "n": 8}, "n", "prompts times n must be at most 128")
    refused(read_completion, {"prompt": "a", "logprobs": 6}, "logprobs", "0 to 5")
    refused(read_completion, {"prompt": "a", "suffix": "b"}, "suffix", "does not support", "unsupported_value")


def test_max_completion_tokens_wins():
    assert read_chat({**ASK, "max_completion_tokens": 5, "max_tokens": 9}, LIMITS).options.max_tokens == 5
    assert read_chat({**ASK, "max_completion_tokens": None, "max_tokens": 9}, LIMITS).options.max_tokens == 9
    assert read_chat(ASK, LIMITS).options.max_tokens is None


IMAGE = {"type": "image_url", "image_url": {"url": "http://x"}}


def test_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": None},
    ]
    assert read_chat({"messages": given}, LIMITS).messages == [
        {"role": "system", "content": "s"}, {"role": "user", "content": "ab"}, {"role": "assistant", "content": ""}
    ]  # fmt: skip
    for message, param, code in (
        ("hi", "messages[0]", "invalid_value"),
        ({"role": "user"}, "messages[0].content", "missing_field"),
        ({"content": "a"}, "messages[0].role", "missing_field"),
        ({"role": "tool", "content": "a"}, "messages[0].role", "invalid_value"),
        ({"role": "user", "content": None}, "messages[0].content", "missing_field"),
        ({"role": "user", "content": 5}, "messages[0].content", "invalid_value"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0]", "invalid_value"),
        ({"role": "user", "content": [IMAGE]}, "messages[0].content[0].type", "invalid_value"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "missing_field"),
        ({"role": "user", "content": "a", "name": "me"}, "messages[0].name", "unsupported_value"),
        ({"role": "user", "content": "a", "rol": "me"}, "messages[0].rol", "unknown_field"),
    ):  # fmt: skip
        refused(read_chat, {"messages": [message]}, param, param.rpartition(".")[2], code)


def test_prompts():
    assert read_completion({"prompt": "a"}, LIMITS).prompts == ["a"]
    assert read_completion({"prompt": ["a", "b"]}, LIMITS).prompts == ["a", "b"]
    assert read_completion({"prompt": [1, 2]}, LIMITS).prompts == [[1, 2]]
    assert read_completion({"prompt": [[1], [2, 3]]}, LIMITS).prompts == [[1], [2, 3]]
    for prompt in ("", [], [""], [[]], ["a", [1]], [[1], "a"], [1, "a"], [1.5], [[True]], {}, 5, ["a"] * 65, [None]):
        with pytest.raises(ApiError) as error:
            read_completion({"prompt": prompt}, LIMITS)
        assert (error.value.status, error.value.param) == (400, "prompt")


def test_json():
    assert decode_json(b'{"a": 1e3, "b": "\\ud83c\\udc04"}') == {"a": 1000.0, "b": "🀄"}


NAMES = sorted({*chat_fields(LIMITS), *completion_fields(LIMITS), "tokens", "parse_special", "return_token_strs"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([1, 2, 5, 300, "</s>", "auto"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=6) | st.sampled_from(["role", "type", "text", "5"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
ROLES = st.sampled_from(["system", "user", "assistant", "developer", "tool"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=9)}), max_size=4)


@pytest.fixture(scope="module")
def server(serve):
    with serve("ok", {"unread": 4096}) as running:
        yield running


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]),
    start=st.sampled_from([{}, ASK, {"prompt": "hi"}, {"tokens": [300]}]),
    fields=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), VALUES, max_size=4),
    messages=st.none() | MESSAGES,
)
def test_no_body_makes_the_server_fail(server: Running, path, start, fields, messages):
    body = {**start, **fields, **({} if messages is None else {"messages": messages})}
    content = json.dumps(body).encode()  # NaN and lone surrogates too
    response = server.client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    elif "text/event-stream" in response.headers["content-type"]:
        assert response.text.endswith("data: [DONE]\n\n")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60))
def test_bytes_that_are_no_json(server: Running, content):
    response = server.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["code"]
