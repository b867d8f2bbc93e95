"""The files around the package agree with it: container, workflows, hooks, citation."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from megatron_switchlora import __version__
from megatron_switchlora.cli.main import COMMANDS
from tests.dist.launch import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def test_the_dockerfile_copies_what_there_is_and_starts_the_command() -> None:
    text = (REPOSITORY / "Dockerfile").read_text()
    copied = [source for line in re.findall(r"^COPY (.*)$", text, re.M) for source in line.split()[:-1]]
    assert "megatron_switchlora" in copied and all((REPOSITORY / source).exists() for source in copied)
    allowed = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert allowed[0] == "*" and {f"!{source}" for source in copied} == {line for line in allowed if line[0] == "!"}
    assert set(re.findall(r"\"(launch|ds_configs|tools/settings)\"", (REPOSITORY / "setup.py").read_text())) <= set(
        copied
    )
    assert 'ENTRYPOINT ["switchlora"]' in text
    assert set(re.findall(r"^#   docker run .* switchlora (\S+)", text, re.M)) == {"pretrain"} <= set(COMMANDS)
    scripts = (REPOSITORY / "pyproject.toml").read_text()
    assert 'switchlora = "megatron_switchlora.cli.main:main"' in scripts
    extras = re.findall(r"/src\[(.*?)\]", text)[0].split(",")
    assert all(re.search(rf"^{extra} = \[", scripts, re.M) for extra in extras)


def test_workflows_call_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    called = [
        word for path in WORKFLOWS for line in runs(path) if line.startswith("make ") for word in line.split()[1:]
    ]
    assert len(called) > 4 and set(called) <= targets


def test_every_workflow_has_a_time_limit_and_few_rights() -> None:
    assert len(WORKFLOWS) > 3
    for path in WORKFLOWS:
        content = yaml.safe_load(path.read_text())
        assert content["permissions"] == {"contents": "read"}, path
        assert all(job.get("timeout-minutes") for job in content["jobs"].values()), path


def runs(path: Path) -> list[str]:
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_hooks_are_what_checks_run() -> None:
    checks = (REPOSITORY / "Makefile").read_text()
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert hooks and all(f"$(BIN)/{hook['entry'].removeprefix('.venv/bin/')}" in checks for hook in hooks)


def test_the_citation_has_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and len(citation["references"]) == 3
