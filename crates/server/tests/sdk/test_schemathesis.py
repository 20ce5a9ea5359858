"""Schemathesis against the published description: no 5xx, nothing that is not described, nothing bad that is accepted.

The seed is fixed. SCHEMATHESIS_EXAMPLES sets the requests per operation.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from conftest import ADMIN_KEY, KEY

CHECKS = ",".join([
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
])
# Its replies take as long as they are asked to.
SLOW = "/admin/timeline"
ADMIN = "^/(admin/|v1/(un)?load_lora_adapter|v1/models/[^/]+/)"


@pytest.mark.parametrize("who, key, select", [("user", KEY, "--exclude-path-regex"), ("admin", ADMIN_KEY, "--include-path-regex")])
def test_requests_from_the_description_are_answered_as_described(url, tmp_path, who, key, select):
    command = [
        pathlib.Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json",
        "--header", f"Authorization: Bearer {key}", select, ADMIN, "--exclude-path", SLOW,
        "--seed", "7", "--max-examples", os.environ.get("SCHEMATHESIS_EXAMPLES", "6"),
        "--phases", "examples,coverage,fuzzing", "--checks", CHECKS, "--continue-on-failure", "--no-shrink",
        "--request-timeout", "60", "--suppress-health-check", "all", "--warnings", "off", "--no-color",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-3000:]
