"""Alerts: their series raise them, a healthy hour does not, and whoever is woken finds what to do."""

import re

import yaml
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule
from conftest import DEPLOY, load, promtool, run

ALERTS = [rule["alert"] for group in load("prometheus/rules.yaml")["groups"] for rule in group["rules"]]


def test_rules_are_well_formed_and_raised_by_what_deserves_them():
    folder = DEPLOY / "prometheus"
    promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yaml", cwd=folder)
    promtool("test", "rules", "rules_test.yaml", cwd=folder)


def test_every_alert_has_series_that_raise_it_and_series_that_do_not():
    cases = [case for test in load("prometheus/rules_test.yaml")["tests"] for case in test["alert_rule_test"]]
    raised = {case["alertname"] for case in cases if case.get("exp_alerts")}
    quiet = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert raised == quiet == set(ALERTS)


def test_every_alert_has_a_section_that_says_what_it_means_and_what_to_do():
    page = (DEPLOY / "docs/alerts.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert list(sections) == ALERTS
    for name, text in sections.items():
        assert "**Means**" in text and "**Do**" in text, name
    for group in load("prometheus/rules.yaml")["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["runbook"] == f"deploy/docs/alerts.md#{rule['alert'].lower()}"


def test_the_operator_takes_the_rules_by_the_command_of_the_page():
    [command] = re.findall(r"^    (\{ cat .*\}) \| kubectl", (DEPLOY / "README.md").read_text(), re.M)
    made = yaml.safe_load(run("sh", "-c", command))
    assert made["spec"] == load("prometheus/rules.yaml")
    read = PrometheusRule.model_validate(made).model_dump(by_alias=True, exclude_unset=True, mode="json")
    assert read["spec"] == made["spec"]
