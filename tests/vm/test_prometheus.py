"""A real Prometheus beside the agent, on the only processor there is: it is never refused, or told half of it.

That no scrape waits for the balloon is shown in tests/unit/test_metrics.py; how long one takes is for ``contrib/bench idle``.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isnan, nan
from statistics import median
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from contrib.vm import Process, VirtualMachine, prometheus
from contrib.vm.experiment import BALLOON_DEVICE, running_agent
from tests.unit.test_deploy_prometheus import configuration, dashboard_queries, rules
from tests.unit.test_metrics import serving, snapshot
from tests.vm.conftest import MEMORY_MIB, Stage

FOLDER = "/run/prometheus"
LISTEN = "127.0.0.1:9090"
# What the guest is to keep, in turn: with the first, each of the sources holds something.
SIZES = (701, 1024, 860, 701, 960, 1024)
# Seconds from one scrape to the next, and the most that one may take.
INTERVAL = 3
# So far back the dashboard's rates look.
RATE_INTERVAL = "15s"
SCRAPES = 20
# Of the alerts, once they are loaded.
EVALUATION = "1s"
ALL = "[10m]"  # longer than the test takes
NOW = "vector(time())"


@pytest.fixture
def scraped(stage: Stage) -> VirtualMachine:
    return stage.machine("scraped", lambda: VirtualMachine(MEMORY_MIB, devices=[BALLOON_DEVICE], cache=True))


@contextmanager
def running_prometheus(machine: VirtualMachine) -> Iterator[Process]:
    """It scrapes the agent every few seconds as the shipped file says, and answers queries. It knows no alerts yet."""
    configure(machine, alerts=False)
    server = machine.start(
        [
            str(prometheus().server),
            f"--config.file={FOLDER}/configuration",
            f"--storage.tsdb.path={FOLDER}/data",
            "--storage.tsdb.wal-segment-size=10MB",
            f"--web.listen-address={LISTEN}",
        ]
    )
    server.wait_for("ready to receive web requests", 120)
    yield server
    server.signal(signal.SIGTERM)
    server.wait(60).check()


def configure(machine: VirtualMachine, *, alerts: bool) -> None:
    written = f"mkdir -p {FOLDER}; cat >{FOLDER}/configuration"
    machine.run(["sh", "-ec", written], stdin=configuration(f"{INTERVAL}s", evaluation=EVALUATION, alerts=alerts)).check()


def query(machine: VirtualMachine, expression: str) -> list[dict[str, Any]]:
    """The series that it matches, with labels and values."""
    url = f"http://{LISTEN}/api/v1/query?query={quote(expression)}"
    answer = json.loads(machine.run(["busybox", "wget", "-q", "-O-", url]).check().out)
    series: list[dict[str, Any]] = answer["data"]["result"]
    return series


def number(machine: VirtualMachine, expression: str) -> float:
    """The value of the first series that it matches; NaN, which is equal to nothing, if there is none yet."""
    series = query(machine, expression)
    return float(series[0]["value"][1]) if series else nan


def becomes(machine: VirtualMachine, expression: str, wanted: float) -> None:
    deadline = time.monotonic() + 120
    while (now := number(machine, expression)) != wanted:
        assert time.monotonic() < deadline, f"{expression} is {now}, not {wanted}"
        # There is a scrape every few seconds. Whoever asks all the time gets in its way.
        time.sleep(0.25)


def answers(machine: VirtualMachine, queries: list[str], moment: float) -> list[list[dict[str, Any]]]:
    """The series that each of them matched at that moment. All at once: a question of its own takes the guest longer."""
    urls = [f"http://{LISTEN}/api/v1/query?time={moment}&query={quote(each, safe='')}" for each in queries]
    script = "\n".join(f"busybox wget -q -O- '{url}'; echo" for url in urls)
    lines = machine.run(["sh", "-e"], stdin=script).check().out.splitlines()
    return [json.loads(line)["data"]["result"] for line in lines]


def without_data(machine: VirtualMachine, moment: float) -> list[str]:
    """Of the dashboard's queries those that had nothing to show, or no number."""
    queries = dashboard_queries(RATE_INTERVAL)
    found = answers(machine, [query for _, query in queries], moment)
    return [
        f"{title}: {query}"
        for (title, query), series in zip(queries, found, strict=True)
        if all(isnan(float(each["value"][1])) for each in series)
    ]


def states_of_alerts(machine: VirtualMachine, server: Process) -> dict[str, str]:
    """What each of the shipped alerts does once it was looked at, or why it does nothing."""
    # Not before: to look at all of them takes the processor that the scrapes are measured on.
    configure(machine, alerts=True)
    server.signal(signal.SIGHUP)
    deadline = time.monotonic() + 120
    while not (found := loaded_alerts(machine)) or "unknown: " in found.values():
        assert time.monotonic() < deadline, f"not all alerts are looked at: {found}"
        time.sleep(0.25)
    return found


def loaded_alerts(machine: VirtualMachine) -> dict[str, str]:
    answer = json.loads(machine.run(["busybox", "wget", "-q", "-O-", f"http://{LISTEN}/api/v1/rules"]).check().out)
    return {
        rule["name"]: rule["state"] if rule["health"] == "ok" else f"{rule['health']}: {rule.get('lastError', '')}"
        for group in answer["data"]["groups"]
        for rule in group["rules"]
    }


def test_a_balloon_that_moves_is_never_refused_and_scraped_whole(scraped: VirtualMachine) -> None:
    with running_agent(scraped, "--sources", "blocks,thp,pages") as agent, running_prometheus(scraped) as server:
        becomes(scraped, "up", 1)
        while number(scraped, f"count_over_time(up{ALL})") < SCRAPES:
            for size in SIZES:
                scraped.set_balloon(size)
                scraped.wait_balloon(size, 120)
                becomes(scraped, "balloon_actual_bytes", (MEMORY_MIB - size) << 20)
        moment = number(scraped, NOW)
        (ups,) = query(scraped, f"up{ALL}")
        (durations,) = query(scraped, f"scrape_duration_seconds{ALL}")
        series = query(scraped, f'{{__name__=~"balloon_(actual|held)_bytes"}}{ALL}')
        begin = time.monotonic()
        lacking, alerts = without_data(scraped, moment), states_of_alerts(scraped, server)
        took = time.monotonic() - begin
    actual: dict[float, int] = {}
    held: dict[float, dict[str, int]] = defaultdict(dict)
    for each in series:
        for moment, value in each["values"]:
            if "source" in each["metric"]:
                held[moment][each["metric"]["source"]] = int(float(value))
            else:
                actual[moment] = int(float(value))
    first, *others = (float(value) for _, value in durations["values"])
    # What Prometheus has given up after all of its time says how slow this machine is. Anything sooner is a refusal.
    failed = {moment for moment, value in ups["values"] if float(value) == 0}
    refused = [(moment, value) for moment, value in durations["values"] if moment in failed and float(value) < INTERVAL]
    figures = (
        f"{len(actual)} scrapes, {len(failed)} failed; median {median(others)} s, slowest {sorted(others)[-5:]}, "
        f"the first {first} s; sizes in MiB {sorted({size >> 20 for size in actual.values()})}"
    )
    print(figures)
    print(f"dashboard and alerts: {took:.1f} s; {alerts}")
    assert not lacking
    assert alerts.keys() == {rule["alert"] for rule in rules()}
    assert set(alerts.values()) <= {"inactive", "pending"}, alerts
    assert not refused, f"{refused}\n{figures}\nall of them: {durations['values']}\nthe agent's log:\n{agent.err}"
    assert {moment: sum(sizes.values()) for moment, sizes in held.items()} == actual, figures
    assert {(MEMORY_MIB - size) << 20 for size in SIZES} <= set(actual.values()), figures
    assert {source for sizes in held.values() for source, size in sizes.items() if size} == {"blocks", "thp", "pages"}, figures


def test_promtool_has_nothing_to_say_about_the_metrics() -> None:
    with (
        serving(replace(snapshot(), device_faults_total={"timeout": 1})) as endpoint,
        urlopen(endpoint.url, timeout=60) as response,
    ):
        text: bytes = response.read()
    assert all(
        name in text for name in (b"balloon_device_faults_total{", b"balloon_run_bytes_bucket{", b"balloon_guest_events_total{")
    )
    # It does speak up: a counter has to be called one.
    for wrong, served in ((False, text), (True, text.replace(b"balloon_holders_lost_total", b"balloon_holders_lost"))):
        done = subprocess.run(
            [prometheus().promtool, "check", "metrics"], input=served, capture_output=True, timeout=60, check=False
        )
        said = (done.stdout + done.stderr).decode()
        assert bool(said) == wrong, said
        assert (done.returncode != 0) == wrong, said
