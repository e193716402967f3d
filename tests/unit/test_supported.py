"""A machine that the agent cannot run on is refused before anything is touched, and not tried again."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from balloon_agent.cli import agent
from balloon_agent.guest import supported


@pytest.mark.skipif(os.geteuid() != 0, reason="who is not root is refused for that")
def test_an_unsupported_machine_is_refused_in_one_line_and_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supported, "this_machine", lambda: ("x86_64", 16384, 1 << 30))
    with caplog.at_level(logging.INFO):
        assert agent.main(["run", "--run-dir", str(tmp_path / "run")]) == 3
    assert caplog.messages == [
        "error: this kernel has pages of 16384 bytes, and the agent supports 4096 only; boot one with 4 KiB pages"
    ]
    assert not (tmp_path / "run").exists()


def test_the_service_is_not_started_again_where_it_cannot_run() -> None:
    unit = Path(__file__).parents[2] / "deploy/systemd/balloon-agent.service"
    assert "\nRestartPreventExitStatus=2 3\n" in unit.read_text()
