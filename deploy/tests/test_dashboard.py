"""The dashboard is what Grafana knows, and every panel says what it shows."""

import json

from conftest import DEPLOY, python_tool, run
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

FILE = DEPLOY / "grafana/baton.json"


def test_panels_explain_themselves_on_whichever_prometheus_is_chosen():
    schema = DEPLOY / "grafana/dashboard.schema.json"
    run(python_tool("check-jsonschema"), "--check-metaschema", schema)
    run(python_tool("check-jsonschema"), "--schemafile", schema, FILE)


def lost(given, read, path=""):
    """Paths of what was given and not read again as it was."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [p for key, value in given.items() for p in lost(value, read.get(key), f"{path}/{key}")]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return [p for n, pair in enumerate(zip(given, read)) for p in lost(*pair, f"{path}/{n}")]
    return [] if given == read else [path]


def test_grafanas_own_types_take_all_of_it():
    plugins.register_default_plugins()
    given = json.loads(FILE.read_text())
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(given)))
    assert lost(given, read) == []


def test_panels_have_places_of_their_own():
    panels = json.loads(FILE.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24, panel["title"]
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
