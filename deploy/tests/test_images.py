"""Images, as far as they can be judged without an engine that builds them."""

import fnmatch
import json
import re
import shutil

import pytest
from conftest import DEPLOY, ROOT, python_tool, run, understood

IMAGES = ["cpu", "cuda", "ascend"]


def instructions(image):
    """Name and rest of each instruction, lines joined."""
    text = (DEPLOY / image / "Containerfile").read_text().replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line and not line.startswith("#")]


def sources(image):
    """What is copied from the repository."""
    copies = [rest.split() for name, rest in instructions(image) if name == "COPY" and "--from=" not in rest]
    return [source for copy in copies for source in copy[:-1]]


@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_has_nothing_to_say(image):
    run(python_tool("hadolint"), "--failure-threshold", "style", DEPLOY / image / "Containerfile")


@pytest.mark.parametrize("image", IMAGES)
def test_bases_are_named_with_their_versions(image):
    bases = {rest.split("=", 1)[0]: rest.split("=", 1)[1] for name, rest in instructions(image) if name == "ARG"}
    used = [rest.split()[0] for name, rest in instructions(image) if name == "FROM"]
    assert [re.fullmatch(r"\$\{(\w+)\}", base).group(1) for base in used] == list(bases)
    for base in bases.values():
        registry, tag = base.split("/", 1)[0], base.rsplit(":", 1)[1]
        assert "." in registry and re.match(r"\d+\.\d+", tag), base


@pytest.mark.parametrize("image", IMAGES)
def test_it_runs_as_nobody_in_particular_and_its_command_is_understood(image, tmp_path):
    steps = dict(instructions(image)[-8:])
    assert steps["USER"] == "65532:65532"
    assert json.loads(steps["ENTRYPOINT"]) == ["/usr/local/bin/baton"]
    table = understood(json.loads(steps["CMD"]), {}, tmp_path)
    assert re.search(rf"^port +{steps['EXPOSE']} ", table, re.M)
    assert re.search(r'^host +"0\.0\.0\.0" ', table, re.M)


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_is_the_whole_workspace(image, tmp_path):
    """Manifests of all members are there, and every file that the code includes."""
    for source in sources(image):
        path = ROOT / source
        assert path.exists(), source
        if path.is_dir():
            shutil.copytree(path, tmp_path / source, ignore=shutil.ignore_patterns("target", "node_modules", "results"))
        else:
            shutil.copy(path, tmp_path / source)
    run("cargo", "metadata", "--locked", "--offline", "--no-deps", "--format-version=1", cwd=tmp_path)
    included = re.compile(r'include(?:_str|_bytes)?!\(\s*"([^"]+)"')
    files = [file for file in tmp_path.rglob("*.rs") if "fuzz" not in file.parts]
    for file in files:
        for name in included.findall(file.read_text()):
            assert (file.parent / name).exists(), f"{file.relative_to(tmp_path)} includes {name}"


def test_what_is_copied_is_not_ignored_and_the_rest_is():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def ignored(path):
        verdict = False
        for rule in rules:
            if fnmatch.fnmatch(path, rule.removeprefix("!")) or path.startswith(rule.removeprefix("!") + "/"):
                verdict = not rule.startswith("!")
        return verdict

    for image in IMAGES:
        assert [source for source in sources(image) if ignored(source)] == []
    assert all(ignored(path) for path in ("target", ".git", ".venv", "deploy", "crates/fuzz/target"))
    # Symbolic links would lead out of what is sent.
    for image in IMAGES:
        for source in sources(image):
            assert not (ROOT / source).is_symlink()
