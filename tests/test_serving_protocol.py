"""What a completion request may hold, and how tokens out of order become text."""

import json
import random
import time
from typing import Any

import pytest
import serving_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from armd import Completion, Event, Written
from armd.text import TextBuilder
from pipelines.serving.config import DeployConfig
from pipelines.serving.errors import ApiError
from pipelines.serving.protocol import CompletionRequest, choice_seed, parse_request

CONFIG = DeployConfig(max_choices=16, max_slots=4, max_queued=12)


def parse(**body: Any) -> CompletionRequest:
    return parse_request(json.dumps(body).encode(), CONFIG)


def refused(body: bytes | dict[str, Any]) -> ApiError:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse_request(content, CONFIG)
    caught.value.encoded()  # whatever a client sent, its quotation can be sent back
    return caught.value


def test_defaults_are_openais() -> None:
    request = parse(prompt="a")
    assert (request.max_tokens, request.n, request.temperature, request.top_p) == (16, 1, 1.0, 1.0)
    assert (request.stop, request.stream, request.include_usage) == ((), False, False)
    assert request.streams == CONFIG.default_streams


def test_null_means_absent_and_neutral_values_change_nothing() -> None:
    """What LangChain sends with every request."""
    request = parse(
        model="armd",
        prompt=["a"],
        best_of=1,
        echo=False,
        frequency_penalty=0,
        logit_bias=None,
        logprobs=None,
        max_tokens=None,
        n=1,
        presence_penalty=0.0,
        seed=None,
        stop=None,
        stream_options=None,
        suffix=None,
        temperature=None,
        top_p=1,
        user=None,
        armd=None,
    )
    assert request.prompts == ["a"]
    assert request.max_tokens == 16
    assert request.ignored == ()


def test_the_four_prompt_forms() -> None:
    assert parse(prompt="text").prompts == ["text"]
    assert parse(prompt=["a", ""]).prompts == ["a", ""]
    assert parse(prompt=[1, 2, 3]).prompts == [[1, 2, 3]]
    assert parse(prompt=[[1, 2], []]).prompts == [[1, 2], []]
    assert parse(prompt=[]).prompts == [[]]
    assert parse().prompts == [""]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "after"),
        ("logprobs", 5),
        ("logprobs", 0),
        ("logprobs", True),
        ("prompt_logprobs", 1),
        ("echo", True),
        ("best_of", 3),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("repetition_penalty", 1.2),
        ("logit_bias", {"5": 1}),
        ("min_p", 0.1),
        ("ignore_eos", True),
        ("stop_token_ids", [5]),
        ("return_token_ids", True),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(field: str, value: Any) -> None:
    error = refused({"prompt": "a", field: value})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b"{", None, "invalid_json"),
        (b"[]", None, "invalid_json"),
        (b"null", None, "invalid_json"),
        (b"\xff\xfe", None, "invalid_json"),
        (b'{"temperature": NaN}', None, "invalid_json"),
        (b'{"temperature": -Infinity}', None, "invalid_json"),
        (b'{"temperature": 1e999}', "temperature", "invalid_value"),
        (b'{"max_tokens": ' + b"9" * 400 + b"}", "max_tokens", "invalid_value"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", None, "invalid_json"),
        (b'{"temperature": ' + b"9" * 400 + b"}", "temperature", "invalid_value"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "invalid_json"),
        (b'{"prompt": "\\ud800"}', "prompt", "invalid_value"),
        (b'{"stop": "\\udfff"}', "stop", "invalid_value"),
        (b'{"armd": {"\\ud800": 1}}', "armd", "unsupported_parameter"),
        ({"prompt": 5}, "prompt", "invalid_value"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_value"),
        ({"prompt": [True]}, "prompt", "invalid_value"),
        ({"prompt": [1, True]}, "prompt", "invalid_value"),
        ({"prompt": [1.5]}, "prompt", "invalid_value"),
        ({"prompt": [1, None]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "token_out_of_range"),
        ({"prompt": [["a"]]}, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 17}, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 5, "n": 4}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 2**63}, "max_tokens", "invalid_value"),
        ({"max_tokens": "16"}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 10**9}, "n", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ["a"] * 100_000}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_value"),
        ({"stop": "a" * 257}, "stop", "invalid_value"),
        ({"stop": 5}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": []}, "stream_options", "invalid_value"),
        ({"armd": []}, "armd", "invalid_value"),
        ({"armd": {"stream": 4}}, "armd", "unsupported_parameter"),
        ({"armd": {"streams": 0}}, "armd.streams", "invalid_value"),
        ({"armd": {"streams": 33}}, "armd.streams", "invalid_value"),
        ({"armd": {"streams": True}}, "armd.streams", "invalid_value"),
        ({"armd": {"streams": 10**400}}, "armd.streams", "invalid_value"),
        ({"logit_bias": {str(i): 1 for i in range(50_000)}}, "logit_bias", "unsupported_parameter"),
        ({"min_tokens": 99, "max_tokens": 1}, "min_tokens", "invalid_value"),
        ({"min_tokens": -1}, "min_tokens", "invalid_value"),
        ({"armd": {"verify": "some"}}, "armd.verify", "invalid_value"),
        ({"armd": {"verify": True}}, "armd.verify", "invalid_value"),
        ({"armd": {"verify": []}}, "armd.verify", "invalid_value"),
    ],
)
def test_bad_bodies_are_400_at_once(body: bytes | dict[str, Any], param: str | None, code: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    start = time.process_time()
    error = refused(content)
    assert time.process_time() - start < 0.05
    assert (error.status, error.param, error.code) == (400, param, code)
    assert len(error.message) < 500


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_NAMES = st.sampled_from(
    [
        "prompt",
        "max_tokens",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "armd",
        "model",
        "suffix",
        "best_of",
        "logprobs",
        "echo",
        "logit_bias",
        "user",
        "presence_penalty",
        "other",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_NAMES, _VALUES, max_size=6))
def test_any_body_is_a_request_or_a_4xx(body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    try:
        request = parse_request(content, CONFIG)
    except ApiError:
        error = refused(content)
        assert error.status in (400, 404)
        assert json.loads(error.encoded())["error"]["message"]
    else:
        assert 1 <= request.n_choices <= CONFIG.max_choices


def test_an_unknown_key_inside_armd_is_named() -> None:
    assert "'stream'" in refused({"armd": {"stream": 4}}).message


def test_another_model_is_404() -> None:
    error = refused({"model": "gpt-4", "prompt": "a"})
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


def test_unknown_fields_are_accepted_and_listed() -> None:
    request = parse(
        prompt="a", session_id="x", zebra=[1], stream=True, stream_options={"include_usage": True, "extra": 1}
    )
    assert request.ignored == ("session_id", "stream_options.extra", "zebra")
    assert request.include_usage


def test_nearly_zero_temperature_is_greedy() -> None:
    assert parse(temperature=1e-300).temperature == 0.0
    assert parse(temperature=0).temperature == 0.0
    assert parse(temperature=0.01).temperature == 0.01


def test_best_of_equal_to_n_and_top_k_minus_one_are_neutral() -> None:
    assert parse(n=2, best_of=2).n == 2
    assert parse(top_k=-1).top_k == 0


def test_seeds_of_choices() -> None:
    seeds = [choice_seed(1234, k) for k in range(16)]
    assert seeds[0] == 1234
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert choice_seed(1235, 1) != choice_seed(1234, 1)
    assert parse(prompt="a").seed != parse(prompt="a").seed


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"port": 0}, "port"),
        ({"port": 70000}, "port"),
        ({"host": ""}, "host"),
        ({"app_name": "../x"}, "app_name"),
        ({"model_name": ""}, "model_name"),
        ({"default_streams": 0}, "default_streams"),
        ({"default_streams": 40}, "max_streams"),
        ({"max_slots": 0}, "max_slots"),
        ({"max_queued": -1}, "max_queued"),
        ({"max_choices": 100}, "max_choices"),
        ({"request_timeout_s": float("nan")}, "request_timeout_s"),
        ({"start_timeout_s": 0}, "start_timeout_s"),
        ({"wait_for_nodes": 0}, "wait_for_nodes"),
        ({"cpus_per_replica": float("inf")}, "cpus_per_replica"),
    ],
)
def test_a_configuration_out_of_range_names_the_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DeployConfig(**fields)


def test_loopback() -> None:
    assert DeployConfig().is_loopback
    assert DeployConfig(host="localhost").is_loopback
    assert DeployConfig(host="::1").is_loopback
    assert not DeployConfig(host="0.0.0.0").is_loopback
    assert not DeployConfig(host="10.0.0.1").is_loopback
    assert DeployConfig(host="0.0.0.0", port=81).url == "http://127.0.0.1:81"
    assert DeployConfig(host="::1", port=81).url == "http://[::1]:81"


# From tokens to text.

WORDS = serving_parts.tokenizer()
SAMPLES = ["the quick brown fox", "Grüße, 世界 \u2013 \U0001f600 ok", "a\ufffdb", "\x00\x01 \n\n\t", ""]


def events(ids: list[int], *, seed: int, reason: str = "length") -> list[Event]:
    """`ids` written in a random order, cut into random steps."""
    generator = random.Random(seed)
    places = list(range(len(ids)))
    if seed:
        generator.shuffle(places)
    steps: list[list[Written]] = [[]]
    for place in places:
        if generator.random() < 0.5 and steps[-1]:
            steps.append([])
        steps[-1].append(Written(place, ids[place], -1.0))
    done = Completion(ids, [], len(steps), reason, [])
    return [Event(0, one, done if one is steps[-1] else None) for one in steps]


def texts(ids: list[int], stop: tuple[str, ...] = (), *, seed: int = 0) -> tuple[TextBuilder, list[str]]:
    builder = TextBuilder(WORDS, stop, (WORDS.eos_id,))
    taken = []
    for event in events(ids, seed=seed):
        if builder.finish_reason is None:
            builder.feed(event)
            taken.append(builder.take())
    return builder, taken


def tail(sample: str) -> list[int]:
    """Ids of random bytes, invalid UTF-8 included, before and after a text."""
    generator = random.Random(sample)
    return [generator.randrange(WORDS.eos_id + 1, WORDS.vocab_size) for _ in range(40)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sample", SAMPLES)
def test_the_pieces_make_up_the_decoded_text(sample: str, seed: int) -> None:
    for ids in (WORDS.encode(sample), WORDS.encode(sample) + tail(sample), tail(sample) + WORDS.encode(sample)):
        if ids:
            builder, taken = texts(ids, seed=seed)
            assert "".join(taken) == WORDS.decode(ids)
            assert builder.tokens == ids
            assert builder.finish_reason == "length"


def test_half_a_character_is_held_back() -> None:
    ids = WORDS.encode("a\U0001f600")
    assert len(ids) == 5
    builder = TextBuilder(WORDS, (), ())
    taken = []
    for index, token in enumerate(ids):
        builder.feed(Event(0, [Written(index, token, 0.0)]))
        taken.append(builder.take())
    assert taken == ["a", "", "", "", "\U0001f600"]


def test_only_the_contiguous_prefix_is_given_out() -> None:
    ids = WORDS.encode("abc")
    builder = TextBuilder(WORDS, (), ())
    builder.feed(Event(0, [Written(2, ids[2], 0.0), Written(0, ids[0], 0.0)]))
    assert builder.take() == "a"
    builder.feed(Event(0, [Written(1, ids[1], 0.0)]))
    assert builder.take() == "bc"
    assert builder.step_of_token == [1, 2, 1]


@pytest.mark.parametrize("seed", range(12))
def test_a_stop_string_ends_the_text_before_it_however_the_steps_are_cut(seed: int) -> None:
    builder, taken = texts(WORDS.encode("one two thXree two end"), ("two e", "hXr"), seed=seed)
    assert "".join(taken) == "one two t"
    assert (builder.finish_reason, builder.stop_reason) == ("stop", "hXr")
    assert WORDS.decode(builder.tokens) == "one two thXr"


@pytest.mark.parametrize("seed", range(6))
def test_what_only_looks_like_a_stop_string_is_given_out_in_the_end(seed: int) -> None:
    builder, taken = texts(WORDS.encode("wait for endin"), ("ending",), seed=seed)
    assert "".join(taken) == "wait for endin"
    assert builder.finish_reason == "length"


def test_an_end_of_text_token_ends_the_text() -> None:
    ids = [*WORDS.encode("ab"), WORDS.eos_id, *WORDS.encode("zz")]
    builder, taken = texts(ids)
    assert "".join(taken) == "ab"
    assert (builder.finish_reason, builder.stop_reason) == ("stop", None)


def test_a_stop_string_across_the_held_back_character() -> None:
    ids = [*WORDS.encode("a"), WORDS.encode("\U0001f600")[0]]
    builder, taken = texts(ids, ("\ufffd",))
    assert "".join(taken) == "a"
    assert builder.stop_reason == "\ufffd"
