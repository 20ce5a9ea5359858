"""What lies beside a released binary, written without building one."""

import json
import os

import pytest
from conftest import ROOT, run
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

XTASK = os.environ.get("XTASK", str(ROOT / "target/release/xtask"))


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """The folder of one target."""
    out = tmp_path_factory.mktemp("dist")
    run(XTASK, "dist", "--papers-only", "--target", "x86_64-unknown-linux-gnu", "--out", out)
    [folder] = [path for path in out.iterdir() if path.is_dir()]
    return folder


def test_the_bill_of_materials_is_one_by_its_schema(papers):
    """One component of each form and licence: the schema takes seconds for all of them, which differ in nothing else but names."""
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    bill = json.loads((papers / "baton.cdx.json").read_text())
    forms = {(tuple(one), json.dumps(one["licenses"])): one for one in bill["components"]}
    assert len(forms) > 10
    bill["components"] = list(forms.values())
    assert validator.validate_str(json.dumps(bill)) is None
    bill["components"] = [bill["components"][0] | {"type": "thing"}]
    assert validator.validate_str(json.dumps(bill)) is not None


def test_what_is_listed_is_what_the_binary_uses_and_every_reference_leads_somewhere(papers):
    bill = json.loads((papers / "baton.cdx.json").read_text())
    names = {component["bom-ref"] for component in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    uses = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    assert uses.keys() == names
    reached, waiting = set(), [bill["metadata"]["component"]["bom-ref"]]
    while waiting:
        if (name := waiting.pop()) not in reached:
            reached.add(name)
            waiting += uses[name]
    assert reached == names
