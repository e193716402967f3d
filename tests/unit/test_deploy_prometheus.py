"""The scrape file, the alerts and the dashboard: sound by themselves, and about what the agent really exports."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from balloon_agent.options import Options
from contrib.vm import prometheus
from tests.unit.test_metrics import scrape, serving, snapshot

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRAPE, ALERTS, CASES = (DEPLOY / "prometheus" / name for name in ("scrape.yml", "alerts.yml", "alerts_test.yml"))
DASHBOARD = DEPLOY / "grafana/balloon-agent.json"
JOB = "balloon-agent"
# What Prometheus itself says of each target.
OF_PROMETHEUS = ("up", "scrape_duration_seconds")
# And puts on everything that it scrapes.
ADDED = ("job", "instance")
SELECTOR = re.compile(r"\b((?:balloon|process|scrape)_\w+|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
WIDTH = 24  # of Grafana's grid

Series = tuple[str, dict[str, str]]


def configuration(interval: str, scrape: str | None = None, evaluation: str = "15s", *, alerts: bool = True) -> str:
    """A whole configuration of Prometheus with the files that are shipped in it; without ``alerts``, all but those."""
    text = SCRAPE.read_text() if scrape is None else scrape
    times = f"{{scrape_interval: {interval}, scrape_timeout: {interval}, evaluation_interval: {evaluation}}}"
    return f"global: {times}\nrule_files: [{ALERTS if alerts else ''}]\n{text}"


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def cases() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(CASES.read_text())["tests"]
    return found


def panels() -> list[dict[str, Any]]:
    """Those that show something: rows are headings."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def dashboard_queries(rate_interval: str = "15s") -> list[tuple[str, str]]:
    """Every query with its panel's title, as Grafana asks for all instances."""
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", rate_interval).replace("$instance", ".*"))
        for panel in panels()
        for target in panel["targets"]
    ]


def expressions() -> list[str]:
    return [rule["expr"] for rule in rules()] + [query for _, query in dashboard_queries()]


def matches(matcher: tuple[str, str, str], labels: dict[str, str]) -> bool:
    label, operator, value = matcher
    if label in ADDED:
        return True
    found = labels.get(label, "")
    equal = re.fullmatch(value, found) is not None if operator.endswith("~") else found == value
    return equal != operator.startswith("!")


@pytest.fixture(scope="module")
def exported() -> list[Series]:
    """What the agent serves when everything has happened at least once, and what Prometheus adds."""
    with serving(snapshot()) as endpoint:
        found = scrape(endpoint.url)
    return [(name, dict(labels)) for name, labels in found] + [(name, {}) for name in OF_PROMETHEUS]


@cache
def program() -> Path:
    return prometheus().promtool


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program(), *arguments], capture_output=True, text=True, timeout=120, check=False)


def clean(done: subprocess.CompletedProcess[str]) -> bool:
    print(done.stdout, done.stderr)
    return done.returncode == 0


def test_promtool_has_nothing_to_say_about_the_rules(tmp_path: Path) -> None:
    assert clean(promtool("check", "rules", "--lint=all", "--lint-fatal", ALERTS))
    broken = tmp_path / "alerts.yml"
    broken.write_text(ALERTS.read_text().replace("balloon_unpinned == 1", "balloon_unpinned =="))
    assert not clean(promtool("check", "rules", "--lint=all", "--lint-fatal", broken))


@pytest.mark.slow
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    assert clean(promtool("test", "rules", CASES))
    # It does see when one has another threshold, waits for less, or says something else.
    for what, instead in (("> 0.8", "> 0.95"), ("for: 5m", "for: 4m"), ("cannot be scraped", "is away")):
        assert what in ALERTS.read_text()
        (tmp_path / ALERTS.name).write_text(ALERTS.read_text().replace(what, instead))
        (tmp_path / CASES.name).write_text(CASES.read_text())
        assert not clean(promtool("test", "rules", tmp_path / CASES.name))


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for case in cases():
        for test in case["alert_rule_test"]:
            for alert in test["exp_alerts"]:
                assert {"summary", "description"} == alert["exp_annotations"].keys()
                assert {"severity", *ADDED} <= alert["exp_labels"].keys()
            (fires if test["exp_alerts"] else silent).add(test["alertname"])
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    assert fires == silent == set(names)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
    assert re.search(r"`balloon(ctl \w+|-agent doctor)( --json)?`", rule["annotations"]["description"])


def test_cases_are_made_of_what_the_agent_exports(exported: list[Series]) -> None:
    for case in cases():
        for given in case["input_series"]:
            (found,) = SELECTOR.finditer(given["series"])
            labels = {label: value for label, _, value in MATCHER.findall(found[2])}
            assert labels.pop("job") == JOB
            del labels["instance"]
            assert (found[1], labels) in exported, given["series"]


def test_alerts_and_dashboard_ask_for_what_the_agent_exports(exported: list[Series]) -> None:
    for expression in expressions():
        selectors = SELECTOR.findall(expression)
        assert selectors, expression
        for name, matchers in selectors:
            wanted = MATCHER.findall(matchers)
            assert any(name == each and all(matches(matcher, labels) for matcher in wanted) for each, labels in exported), (
                f"{name}{{{matchers}}} of {expression}"
            )


def test_everything_that_the_agent_exports_is_on_the_dashboard(exported: list[Series]) -> None:
    shown = {name for _, query in dashboard_queries() for name, _ in SELECTOR.findall(query)}
    assert {name for name, _ in exported} - shown == set()


def test_alerts_and_dashboard_know_the_agents_by_the_job_of_the_scrape_file() -> None:
    (job,) = yaml.safe_load(SCRAPE.read_text())["scrape_configs"]
    assert job["job_name"] == JOB
    assert job["static_configs"] == [{"targets": [Options().metrics_listen]}]
    for expression in expressions():
        assert {value for label, _, value in MATCHER.findall(expression) if label == "job"} <= {JOB}, expression
        # Others have these, too.
        for name, matchers in SELECTOR.findall(expression):
            own = name.startswith("balloon_") or f'job="{JOB}"' in matchers
            assert own or name == "process_max_fds", expression


@pytest.mark.parametrize("secured", [False, True])
def test_a_configuration_with_all_of_it_is_sound(tmp_path: Path, secured: bool) -> None:
    text = SCRAPE.read_text()
    if secured:
        head, mark, tail = text.partition("serves TLS:\n")
        text = head + mark + re.sub(r"^( {4})# ", r"\1", tail, flags=re.MULTILINE)
        text = text.replace("/etc/prometheus/balloon-agent", str(tmp_path))
        (job,) = yaml.safe_load(text)["scrape_configs"]
        assert job["scheme"] == "https"
        assert job["tls_config"].keys() == {"ca_file", "cert_file", "key_file"}
        for path in job["tls_config"].values():
            Path(path).write_text("")
    path = tmp_path / "prometheus.yml"
    path.write_text(configuration("15s", text))
    assert clean(promtool("check", "config", path))
    path.write_text(configuration("15s", text.replace("static_configs", "static_config")))
    assert not clean(promtool("check", "config", path))


def overlaps(one: dict[str, int], other: dict[str, int]) -> bool:
    apart = (
        one["x"] + one["w"] <= other["x"]
        or other["x"] + other["w"] <= one["x"]
        or one["y"] + one["h"] <= other["y"]
        or other["y"] + other["h"] <= one["y"]
    )
    return not apart


def test_the_dashboard_is_laid_out_well() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    everything = dashboard["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    for one, other in combinations(everything, 2):
        assert not overlaps(one["gridPos"], other["gridPos"]), f"{one['title']} and {other['title']}"
    for panel in everything:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= WIDTH, panel["title"]
    titles = [panel["title"] for panel in panels()]
    assert len(titles) > 30
    for panel in panels():
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert references, panel["title"]
        assert len(references) == len(set(references)), panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "instance"]
    assert dashboard["schemaVersion"] >= 39


def test_queries_of_the_dashboard_use_its_variables_and_no_others() -> None:
    for title, query in dashboard_queries():
        assert "$" not in query, f"{title}: {query}"
        assert all('instance=~".*"' in matchers for _, matchers in SELECTOR.findall(query)), f"{title}: {query}"


def test_the_dashboard_is_written_tidily() -> None:
    text = DASHBOARD.read_text()
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"
