"""OpenAI's own client against a real server."""

from __future__ import annotations

import time

import openai
import pytest

from tests.serve.conftest import LENGTH, Running

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
KEY = "sk-0123456789abcdef"


def client_of(server: Running, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": KEY, "max_retries": 0, **options})


@pytest.fixture(scope="module")
def server(serve):
    with serve("the answer is 42, as ever") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    found = client.models.retrieve("tiny")
    assert (found.object, found.owned_by, found.max_model_len) == ("model", "bc2_jax", LENGTH)
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_a_chat(server, client):
    reply = client.chat.completions.create(
        **ASK, n=2, seed=7, stop=["z"], logit_bias={"300": 1}, logprobs=True, top_logprobs=2, max_completion_tokens=40,
        max_tokens=3, presence_penalty=0.5, frequency_penalty=-0.5, temperature=0.2, top_p=0.9, user="me",
        extra_body={"top_k": 7, "repetition_penalty": 1.2, "min_tokens": 2, "return_token_ids": True},
    )  # fmt: skip
    assert reply.object == "chat.completion" and reply.model == "tiny" and reply.system_fingerprint == "bc2-0123"
    assert [choice.index for choice in reply.choices] == [0, 1] and reply.seed == 7
    for place, choice in enumerate(reply.choices):
        assert (choice.message.role, choice.message.content) == ("assistant", "the answer is 42, as ever")
        assert choice.finish_reason == "stop"
        content = choice.logprobs.content
        assert [token.token for token in content][-1] == "</s>" and content[-1].bytes is None
        assert b"".join(bytes(token.bytes or []) for token in content).decode() == choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in content)
        assert len(content) == len(choice.token_ids)
        request = server.service.requests[place - 2]
        assert (request.place, request.top_log_probs, list(request.ids)) == (place, 2, choice.prompt_token_ids)
        settings = request.settings
        assert (settings.max_new_tokens, settings.seed, settings.top_k, settings.min_tokens) == (40, 7, 7, 2)
        assert (settings.temperature, settings.top_p, settings.repetition_penalty) == (0.2, 0.9, 1.2)
        assert (settings.presence_penalty, settings.frequency_penalty) == (0.5, -0.5)
        assert settings.logit_bias == {300: 1.0}
        assert settings.vocab_size == server.model.tokenizer.vocab_size
    usage = reply.usage
    assert usage.completion_tokens == 2 * len(reply.choices[0].token_ids)
    assert usage.prompt_tokens == len(server.service.requests[-1].ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2


def test_the_defaults_of_chats_and_completions(server, client):
    client.chat.completions.create(**ASK)
    client.completions.create(model="tiny", prompt="hi")
    chat, completion = (request.settings for request in server.service.requests[-2:])
    assert (chat.temperature, chat.top_k, chat.repetition_penalty, chat.max_new_tokens) == (0.4, 5, 1.05, 99)
    assert set(chat.eos_token_id) == {2, 195, 196}
    assert (completion.temperature, completion.top_k, completion.top_p, completion.repetition_penalty) == (1, 0, 1, 1)
    assert completion.max_new_tokens == 16 and completion.eos_token_id == (2,)
    assert chat.seed != completion.seed


def test_a_message_can_be_sent_back(client):
    """With all the fields that it was received with."""
    message = client.chat.completions.create(**ASK).choices[0].message
    messages = [*ASK["messages"], message, {"role": "user", "content": [{"type": "text", "text": "and?"}]}]
    assert client.chat.completions.create(model="tiny", messages=messages).choices[0].finish_reason == "stop"


def test_a_stream(client):
    chunks = list(client.chat.completions.create(**ASK, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "the answer is 42, as ever"
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].choices[0].delta.content is None
    assert all(c.usage is None and c.object == "chat.completion.chunk" for c in chunks)
    assert len({(c.id, c.created, c.system_fingerprint) for c in chunks}) == 1


def test_usage_of_a_stream(client):
    def usages(**options):
        chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options=options))
        return [chunk.usage for chunk in chunks], chunks

    found, chunks = usages(include_usage=True)
    assert all(usage is None for usage in found[:-1]) and found[-1].completion_tokens > 5 and chunks[-1].choices == []
    found, chunks = usages()
    assert all(usage is None for usage in found) and chunks[-1].choices
    found, _ = usages(include_usage=True, continuous_usage_stats=True)
    counts = [usage.completion_tokens for usage in found]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] > 5


def test_a_stream_of_several_choices_has_log_probs(client):
    chunks = client.chat.completions.create(**ASK, stream=True, n=3, logprobs=True, top_logprobs=1)
    text, tokens, roles = {}, {}, {}
    for chunk in chunks:
        [choice] = chunk.choices
        text[choice.index] = text.get(choice.index, "") + (choice.delta.content or "")
        roles[choice.index] = roles.get(choice.index, 0) + (choice.delta.role is not None)
        if choice.logprobs:
            tokens.setdefault(choice.index, []).extend(choice.logprobs.content)
    assert text == dict.fromkeys(range(3), "the answer is 42, as ever") and set(roles.values()) == {1}
    for found in tokens.values():
        assert b"".join(bytes(t.bytes or []) for t in found).decode() == text[0] and found[-1].token == "</s>"


def test_the_streaming_helper(client):
    with client.chat.completions.stream(**ASK) as stream:
        assert sum(event.type == "content.delta" for event in stream) > 3
        assert stream.get_final_completion().choices[0].message.content == "the answer is 42, as ever"


def test_a_completion(server, client):
    reply = client.completions.create(model="tiny", prompt=["hi", "yo"], n=2, stop=" is", logprobs=3, max_tokens=30)
    assert [(c.index, c.text, c.finish_reason) for c in reply.choices] == [(i, "the answer", "stop") for i in range(4)]
    log_probs = reply.choices[0].logprobs
    assert "".join(log_probs.tokens).startswith("the answer is") and log_probs.text_offset[0] == 0
    assert all(len(top) == 3 for top in log_probs.top_logprobs)
    assert [r.place for r in server.service.requests[-4:]] == [0, 1, 0, 1]
    chunks = list(client.completions.create(model="tiny", prompt="hi", stream=True, max_tokens=30, echo=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hithe answer is 42, as ever"
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].object == "text_completion"


def test_a_length_that_is_too_short(client):
    choice = client.chat.completions.create(**ASK, max_tokens=3).choices[0]
    assert choice.finish_reason == "length" and "the answer".startswith(choice.message.content)


@pytest.mark.parametrize(
    ("options", "error", "code", "param"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"max_tokens": LENGTH}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "unsupported_value", "tools"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "unsupported_value", "response_format"),
        ({"extra_body": {"tempratur": 1}}, openai.BadRequestError, "unknown_field", "tempratur"),
    ],
)  # fmt: skip
def test_errors_are_those_of_the_client(client, options, error, code, param):
    with pytest.raises(error) as found:
        client.chat.completions.create(**{**ASK, **options})
    assert (found.value.code, found.value.param) == (code, param)
    assert found.value.message and found.value.request_id.startswith("req-")


def test_keys(serve):
    with serve(keys=[("someone", KEY)]) as server:
        assert client_of(server).chat.completions.create(**ASK).choices[0].message.content == "hello world"
        assert server.service.requests[-1].owner == "someone"
        with pytest.raises(openai.AuthenticationError) as error:
            client_of(server, api_key=KEY + "x").chat.completions.create(**ASK)
        assert error.value.code == "invalid_api_key" and KEY not in str(error.value)


def test_a_full_queue_is_tried_again(serve):
    with serve(fake={"full": 1}) as server:
        start = time.monotonic()
        assert client_of(server, max_retries=2).chat.completions.create(**ASK).choices[0].message.content
        assert time.monotonic() - start >= 0.9
        server.service.full = 1
        with pytest.raises(openai.RateLimitError) as error:
            client_of(server).chat.completions.create(**ASK)
        assert error.value.code == "queue_full" and error.value.response.headers["retry-after"] == "1"


def test_what_the_client_leaves_is_cancelled(serve):
    with serve("a" * 150, fake={"token_s": 0.02}) as server:
        stream = client_of(server).chat.completions.create(**ASK, stream=True)
        for i, _ in enumerate(stream):
            if i == 3:
                stream.close()
                break
        assert server.service.wait_idle() and server.service.ended == ["cancelled"]
        with pytest.raises(openai.APITimeoutError):
            client_of(server, timeout=1).chat.completions.create(**ASK)
        assert server.service.wait_idle() and server.service.ended == ["cancelled"] * 2


def test_a_failure_in_the_stream(serve):
    with serve("a long answer", fake={"fail_after": 3}) as server:
        with pytest.raises(openai.APIError, match="The engine has failed"):
            list(client_of(server).chat.completions.create(**ASK, stream=True))
        with pytest.raises(openai.InternalServerError) as error:
            client_of(server).chat.completions.create(**ASK)
        assert error.value.status_code == 500 and "req-" in error.value.request_id
