"""What all checks of deploy/ share: the real binary, the tools, and what the manifests become.

BATON names the binary (default: target/release/baton). Tools of Python are in requirements.txt beside this; those of Debian are taken
from the path, else unpacked from the distribution's packages. A tool that cannot be had is a failure, not a skip.
"""

import contextlib
import functools
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
BATON = os.environ.get("BATON", str(ROOT / "target/release/baton"))
KEY = "deploy-test-key"
# What can be compiled in: every label and family is there, drafts and adapters included.
SERVE = ["--enable-lora", "--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}']
METRIC = re.compile(r"\b(?:baton_|process_|vllm:)[a-z0-9_:]+")


def run(*command, stdin=None, cwd=ROOT, env=None):
    """The output of a command that must end well."""
    done = subprocess.run([str(part) for part in command], input=stdin, cwd=cwd, env=env, text=True, capture_output=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def python_tool(name):
    """A program that the requirements install, beside the interpreter that runs this."""
    path = pathlib.Path(sys.executable).parent / name
    assert path.exists(), f"{path} is missing: pip install -r deploy/tests/requirements.txt"
    return path


@functools.cache
def debian_tool(path, *packages):
    """A program of the system, or of these packages, unpacked and not installed; and the environment to run it in."""
    if found := shutil.which(pathlib.Path(path).name):
        return found, dict(os.environ)
    folder = ROOT / "target/deploy" / packages[0]
    if not (folder / path).exists():
        folder.mkdir(parents=True, exist_ok=True)
        download = ["apt-get", "-qq", "download", *packages]
        if subprocess.run(download, cwd=folder).returncode != 0:
            # A bare machine has no lists yet.
            run("apt-get", "-qq", "update")
            run(*download, cwd=folder)
        for package in folder.glob("*.deb"):
            run("dpkg", "-x", package, folder)
    libraries = {str(library.parent) for library in folder.rglob("lib*.so*")}
    return folder / path, os.environ | {"LD_LIBRARY_PATH": ":".join(sorted(libraries))}


def promtool(*arguments, stdin=None, cwd=ROOT):
    program, env = debian_tool("usr/bin/promtool", "prometheus")
    return run(program, *arguments, stdin=stdin, cwd=cwd, env=env)


def systemd_analyze(*arguments):
    """Its output, warnings included, which it gives an exit code of 0."""
    packages = ["systemd", "libsystemd-shared", "libkmod2", "libip4tc2", "libapparmor1"]
    program, env = debian_tool("usr/bin/systemd-analyze", *packages)
    done = subprocess.run([program, *map(str, arguments)], env=env, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def eventually(what, condition, seconds=30):
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return value


class Server:
    """A Baton that runs, and asks with the key."""

    def __init__(self, process, port):
        self.process, self.port = process, port

    @contextlib.contextmanager
    def reply(self, path, body=None, key=KEY):
        """A reply whose head has come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with contextlib.closing(connection):
            if body is None:
                connection.request("GET", path, headers=headers)
            else:
                connection.request("POST", path, json.dumps(body), headers | {"content-type": "application/json"})
            yield connection.getresponse()

    def call(self, path, body=None, key=KEY):
        """Status and text of a whole reply."""
        with self.reply(path, body, key) as reply:
            return reply.status, reply.read().decode()

    def is_ready(self):
        try:
            return self.call("/ready")[0] == 200
        except OSError:
            return False

    def metrics(self):
        status, text = self.call("/metrics")
        assert status == 200, text
        return text


@contextlib.contextmanager
def serving(arguments, settings, port):
    """The binary, started and ready; it must end well."""
    process = subprocess.Popen([BATON, *arguments], cwd=ROOT, env=environment(settings))
    server = Server(process, port)

    def is_ready():
        assert process.poll() is None, "the server ended"
        return server.is_ready()

    try:
        eventually("ready", is_ready, 60)
        yield server
        process.terminate()
        assert process.wait(timeout=60) == 0, "SIGTERM must end in exit code 0"
    finally:
        process.kill()


@pytest.fixture(scope="session")
def server():
    """The bundled model, with its proof, and what it has counted of a first reply."""
    port = free_port()
    command = ["serve", "--host", "0.0.0.0", "--port", str(port), "--api-key", KEY, *SERVE, "--log-level", "warn"]
    with serving(command, {}, port) as server:
        status, text = server.call("/v1/completions", {"model": "abacus", "prompt": "1+1=", "max_tokens": 4})
        assert status == 200, text
        # The figures of the proof are among the metrics.
        eventually("the hand-off is proven", lambda: "\nbaton_parity_kl{" in server.metrics(), 60)
        yield server


def environment(settings):
    """These settings, and none that happen to be set here."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BATON_")} | settings


@functools.cache
def environment_names():
    """Names of the environment that `baton serve` reads."""
    names = set(re.findall(r"\[env: ([A-Z0-9_]+)=", run(BATON, "serve", "--help")))
    assert "BATON_PORT" in names, names
    return names


def with_keys(arguments, file, tmp_path):
    """A command line whose file of keys is one with the key, for all that it may be for."""
    keys = tmp_path / "keys.toml"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys.write_text(f'[[key]]\nname = "test"\nscopes = ["inference", "metrics"]\nsha256 = "{digest}"\n')
    return [str(keys) if argument == file else argument for argument in arguments]


def understood(arguments, settings=None):
    """What the binary makes of a command line and settings, which it must take as they are."""
    settings = settings or {}
    unknown = {name for name in settings if name.startswith("BATON_")} - environment_names()
    assert not unknown, f"no settings of baton serve: {unknown}"
    assert arguments[0] == "serve", arguments
    return run(BATON, *arguments, "--print-config", env=environment(settings))


def load(path):
    """The one document of a YAML file."""
    return yaml.safe_load((DEPLOY / path).read_text())
