"""Traces as OpenTelemetry's own messages read them, and the official SDK joined to them."""

import http.server
import queue
import threading

import openai
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from conftest import KEY, SUM, serving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def collector():
    """Where to send traces, and the messages that have arrived."""
    arrived = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            arrived.put((self.path, self.headers["content-type"], ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}", arrived


def fields_are_known(message):
    """Nothing in the message or in any part of it is unknown to the protocol."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    return known.SerializeToString(deterministic=True) == message.SerializeToString(deterministic=True)


def value(attributes, name):
    (found,) = [pair.value for pair in attributes if pair.key == name]
    return getattr(found, found.WhichOneof("value"))


def test_a_streamed_chat_is_part_of_its_clients_trace():
    endpoint, arrived = collector()
    with serving("--api-key", KEY, "--otlp-traces-endpoint", endpoint) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        header = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        options = {"include_usage": True}
        stream = client.chat.completions.create(
            model="abacus", messages=SUM, stream=True, stream_options=options, temperature=0, extra_headers=header
        )
        usage = [chunk.usage for chunk in stream][-1]
    path, kind, message = arrived.get(timeout=30)
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    assert fields_are_known(message)
    (resource_spans,) = message.resource_spans
    assert value(resource_spans.resource.attributes, "service.name") == "baton"
    (scope_spans,) = resource_spans.scope_spans
    assert scope_spans.scope.name == "baton"
    request, *parts = scope_spans.spans
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert (request.name, request.kind, request.status.code) == (
        "chat abacus", Span.SPAN_KIND_SERVER, Status.STATUS_CODE_UNSET,
    )
    assert value(request.attributes, "gen_ai.usage.input_tokens") == usage.prompt_tokens
    assert value(request.attributes, "gen_ai.usage.output_tokens") == usage.completion_tokens
    reasons = value(request.attributes, "gen_ai.response.finish_reasons")
    assert [reason.string_value for reason in reasons.values] == ["stop"]
    assert [part.name for part in parts] == ["queue", "prefill", "decode"]
    for part in parts:
        assert (part.trace_id, part.parent_span_id) == (request.trace_id, request.span_id)
        assert part.kind == Span.SPAN_KIND_INTERNAL
        assert request.start_time_unix_nano <= part.start_time_unix_nano <= part.end_time_unix_nano
        assert part.end_time_unix_nano <= request.end_time_unix_nano


def test_a_trace_that_is_not_sampled_is_not_sent():
    endpoint, arrived = collector()
    with serving("--api-key", KEY, "--otlp-traces-endpoint", endpoint) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        for flags in ("00", "01"):
            header = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
            client.chat.completions.create(model="abacus", messages=SUM, max_tokens=2, extra_headers=header)
    messages = [arrived.get(timeout=30)[2]] + [arrived.get()[2] for _ in range(arrived.qsize())]
    spans = [span for message in messages for group in message.resource_spans for span in group.scope_spans[0].spans]
    assert [span.name for span in spans] == ["chat abacus", "queue", "prefill", "decode"]
