"""Files and batches by the official OpenAI Python SDK."""

import json
import time

import openai
import pytest

from conftest import SUM


def line(number, body, url="/v1/chat/completions"):
    return json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body})


@pytest.fixture()
def batch_input(client):
    ok = {"model": "abacus", "messages": SUM, "temperature": 0}
    lines = [line(0, ok), line(1, {**ok, "temperature": 3}), line(2, {**ok, "model": "other"}), line(3, ok)]
    return client.files.create(file=("input.jsonl", "\n".join(lines).encode()), purpose="batch")


def test_a_file_is_kept_listed_read_and_deleted(client, batch_input):
    assert batch_input.object == "file" and batch_input.purpose == "batch" and batch_input.filename == "input.jsonl"
    assert client.files.retrieve(batch_input.id).bytes == batch_input.bytes
    assert batch_input.id in [file.id for file in client.files.list()]
    assert client.files.content(batch_input.id).text.count("custom_id") == 4
    assert client.files.delete(batch_input.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(batch_input.id)


def test_a_batch_answers_each_line_once(client, batch_input):
    batch = client.batches.create(
        input_file_id=batch_input.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"of": "the test"},
    )
    assert batch.object == "batch" and batch.metadata == {"of": "the test"}
    for _ in range(600):
        batch = client.batches.retrieve(batch.id)
        if batch.status not in ("validating", "in_progress", "finalizing"):
            break
        time.sleep(0.05)
    assert batch.status == "completed", batch
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (4, 2, 2)
    right = [json.loads(text) for text in client.files.content(batch.output_file_id).text.splitlines()]
    wrong = [json.loads(text) for text in client.files.content(batch.error_file_id).text.splitlines()]
    assert sorted(row["custom_id"] for row in right) == ["line-0", "line-3"]
    for row in right:
        assert row["response"]["status_code"] == 200 and row["error"] is None
        assert row["response"]["body"]["choices"][0]["message"]["content"] == "347 + 286 = 633."
    assert sorted(row["custom_id"] for row in wrong) == ["line-1", "line-2"]
    assert sorted(row["response"]["status_code"] for row in wrong) == [400, 404]
    assert batch.id in [other.id for other in client.batches.list()]


def test_a_batch_is_cancelled(client):
    slow = {"model": "abacus", "messages": SUM, "max_tokens": 900, "ignore_eos": True}
    lines = "\n".join(line(number, slow) for number in range(200)).encode()
    file = client.files.create(file=("slow.jsonl", lines), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    for _ in range(600):
        batch = client.batches.retrieve(batch.id)
        if batch.status != "cancelling":
            break
        time.sleep(0.05)
    assert batch.status == "cancelled"


def test_what_is_no_batch_is_refused(client):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
        client.batches.create(
            input_file_id="file-none", endpoint="/v1/chat/completions", completion_window="24h"
        )
