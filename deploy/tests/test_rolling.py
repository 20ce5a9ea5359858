"""A rolling update without a cluster: real replicas, started by their manifest, and routers that learn of a change at their next request."""

import contextlib
import json
import random
import threading

from conftest import eventually, free_port, serving, with_keys
from test_kubernetes import KEYS, rendered, settings, workloads

ROUTERS = 4
WORDS = {"model": "abacus", "prompt": "What is 347 + 286?", "max_tokens": 32, "stream": True}
# What keeps a replica busy while it is asked to go.
LONG = {"model": "abacus", "prompt": "hm", "max_tokens": 400, "ignore_eos": True, "n": 4, "stream": True}


def ended_well(status, text):
    """The stream was begun, has its last event, and no error in between."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return status == 200 and events[-1] == "[DONE]" and not any("error" in json.loads(event) for event in events[:-1])


class Endpoints:
    """The replicas that there are, in versions, and which version each router has heard of."""

    def __init__(self, replicas):
        self.lock, self.replicas, self.version = threading.Lock(), replicas, 0
        self.heard, self.failures, self.requests, self.closed = [0] * ROUTERS, [], 0, False

    def change(self, replicas):
        with self.lock:
            self.replicas, self.version = replicas, self.version + 1

    def everybody_has_heard(self):
        with self.lock:
            return min(self.heard) == self.version

    def route(self, router):
        while not self.closed:
            with self.lock:
                self.heard[router], replica = self.version, random.choice(self.replicas)
            try:
                reply = replica.call("/v1/completions", WORDS)
                failure = None if ended_well(*reply) else reply
            except (OSError, ValueError) as error:
                failure = error
            with self.lock:
                self.requests += 1
                if failure:
                    self.failures.append(failure)


def test_replacing_every_replica_loses_no_request_and_no_stream(tmp_path):
    objects = rendered("cpu")
    _, _, container = next(found for found in workloads(objects) if found[0] == "baton")
    arguments = with_keys(container["args"], KEYS, tmp_path)

    with contextlib.ExitStack() as running:

        def started():
            port = free_port()
            here = settings(objects) | {"BATON_PORT": str(port), "BATON_THREADS": "1", "BATON_LOG_LEVEL": "warn"}
            return running.enter_context(serving(arguments, here, port))

        replicas = [started(), started()]
        endpoints = Endpoints(replicas)
        routers = [threading.Thread(target=endpoints.route, args=[n]) for n in range(ROUTERS)]
        [router.start() for router in routers]
        try:
            for old in list(replicas):
                replicas = [replica for replica in replicas if replica is not old] + [started()]
                endpoints.change(replicas)
                # What preStop waits for.
                eventually("every router has heard", endpoints.everybody_has_heard)
                with old.reply("/v1/completions", LONG) as stream:
                    first = stream.readline()
                    old.process.terminate()
                    assert ended_well(stream.status, (first + stream.read()).decode())
                assert old.process.wait(timeout=55) == 0
        finally:
            endpoints.closed = True
            [router.join() for router in routers]
        assert endpoints.failures == [] and endpoints.requests > 2 * ROUTERS
