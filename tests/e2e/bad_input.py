"""Requests that are bad in one thing, and how each face says them."""

import json
import math

from rayllm.proto.v1 import inference_pb2 as pb

MODEL = "tiny"

# (case, field at fault, what is bad about an otherwise good request)
BAD = [
    ("prompt longer than the context", "prompt", {"prompt": [65] * 513}),
    ("text longer than the context", "prompt", {"prompt": "ab " * 300}),
    ("10 MB of text", "prompt", {"prompt": "a" * 10_000_000}),
    ("no text", "prompt", {"prompt": ""}),
    ("no tokens", "prompt", {"prompt": []}),
    ("NUL", "prompt", {"prompt": "a\0b"}),
    ("negative token id", "prompt", {"prompt": [65, -1]}),
    ("token id outside the vocabulary", "prompt", {"prompt": [65, 264]}),
    ("huge token id", "prompt", {"prompt": [2**31 - 1]}),
    ("n=1e9", "n", {"n": 10**9}),
    ("n=0", "n", {"n": 0}),
    ("max_tokens=0", "max_tokens", {"max_tokens": 0}),
    ("max_tokens=-1", "max_tokens", {"max_tokens": -1}),
    ("max_tokens=1e12", "max_tokens", {"max_tokens": 10**12}),
    ("max_tokens past the context", "max_tokens", {"max_tokens": 600}),
    ("min_tokens above max_tokens", "min_tokens", {"min_tokens": 9, "max_tokens": 8}),
    ("temperature NaN", "temperature", {"temperature": math.nan}),
    ("temperature inf", "temperature", {"temperature": math.inf}),
    ("temperature -1", "temperature", {"temperature": -1.0}),
    ("temperature 1e30", "temperature", {"temperature": 1e30}),
    ("top_p 0", "top_p", {"top_p": 0.0}),
    ("top_p 1.1", "top_p", {"top_p": 1.1}),
    ("top_k -5", "top_k", {"top_k": -5}),
    ("min_p 2", "min_p", {"min_p": 2.0}),
    ("repetition_penalty 0", "repetition_penalty", {"repetition_penalty": 0.0}),
    ("frequency_penalty 3", "frequency_penalty", {"frequency_penalty": 3.0}),
    ("presence_penalty NaN", "presence_penalty", {"presence_penalty": math.nan}),
    ("logprobs=1e6", "logprobs", {"logprobs": 10**6}),
    ("prompt_logprobs=-1", "prompt_logprobs", {"prompt_logprobs": -1}),
    ("prompt_logprobs_start=0", "prompt_logprobs_start", {"prompt_logprobs": 0, "prompt_logprobs_start": 0}),
    (
        "prompt_logprobs_start past the prompt",
        "prompt_logprobs_start",
        {"prompt_logprobs": 0, "prompt_logprobs_start": 99},
    ),
    ("prompt_logprobs_start alone", "prompt_logprobs_start", {"prompt_logprobs_start": 2}),
    ("logprob_token_ids alone", "logprob_token_ids", {"logprob_token_ids": [1]}),
    ("logprob_token_ids outside the vocabulary", "logprob_token_ids", {"logprobs": 0, "logprob_token_ids": [10**6]}),
    ("10,000 stop strings", "stop", {"stop": ["x"] * 10_000}),
    ("empty stop string", "stop", {"stop": [""]}),
    ("1 MB stop string", "stop", {"stop": ["x" * 1_000_000]}),
    ("stop token outside the vocabulary", "stop_token_ids", {"stop_token_ids": [10**6]}),
    ("logit_bias outside the vocabulary", "logit_bias", {"logit_bias": {999999: 1.0}}),
    ("logit_bias too strong", "logit_bias", {"logit_bias": {1: 1e6}}),
    ("timeout_ms=0", "timeout_ms", {"timeout_ms": 0}),
    ("timeout_ms=-1", "timeout_ms", {"timeout_ms": -1}),
    ("request_id with a space", "request_id", {"request_id": "a b"}),
    ("request_id too long", "request_id", {"request_id": "a" * 129}),
    ("another model", "model", {"model": "gpt-5"}),
]


def http_body(bad: dict) -> bytes:
    # json writes NaN and Infinity as they are: no JSON, but what a careless client sends.
    return json.dumps({"model": MODEL, "prompt": "good", "max_tokens": 4} | bad).encode()


def grpc_request(bad: dict) -> pb.GenerateRequest:
    options = {"model": MODEL, "prompt": "good", "max_tokens": 4} | bad
    request = pb.GenerateRequest(model=options.pop("model"), request_id=options.pop("request_id", ""))
    prompt = options.pop("prompt")
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    if "timeout_ms" in options:
        request.timeout_ms = options.pop("timeout_ms")
    request.sampling.CopyFrom(pb.SamplingParams(**options))
    return request
