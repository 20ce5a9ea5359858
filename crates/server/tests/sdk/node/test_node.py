"""The suites for Node, which `npm ci` has been run for, against the shared server."""

import os
import pathlib
import subprocess

from conftest import KEY


def test_the_suites_for_node(url):
    env = {**os.environ, "BATON_URL": url, "BATON_KEY": KEY}
    done = subprocess.run(
        ["node", "--test", "--test-concurrency=1"], cwd=pathlib.Path(__file__).parent, env=env,
        capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
