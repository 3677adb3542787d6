"""Progress: a bar on a terminal, plain lines elsewhere, the same numbers in both."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import job

from batch_rerank.job.progress import Meter
from batch_rerank.store.receipts import Totals


def test_rates_start_with_the_first_finished_unit() -> None:
    meter, totals = Meter(), Totals()
    for now, pairs in ((100.0, 50), (102.0, 70), (104.0, 90)):
        totals.rows_in, totals.tokens = pairs, pairs * 10
        meter.add(now, totals)
    assert meter.rates == (10.0, 100.0)


def test_one_unit_has_no_rate() -> None:
    meter = Meter()
    meter.add(1.0, Totals(rows_in=10))
    assert meter.rates is None


@pytest.fixture
def command(flat_shards: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "job.yaml").write_text(job(flat_shards, tmp_path / "out").model_dump_json(exclude={"limit"}))
    return [sys.executable, "-m", "batch_rerank.cli", "run", str(tmp_path / "job.yaml"), "--local"]


def test_without_a_terminal_there_are_plain_lines(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(
        r"^6/6 units  300/300 pairs  [\d,]+ pairs/s  [\d,]+ tokens/s  ETA 0:00$", done.stderr, re.MULTILINE
    )
    assert "\x1b" not in done.stderr


def test_on_a_terminal_there_is_a_bar_with_rates(command: list[str]) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "150"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux gives EIO when the other side has closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "\x1b[" in text
    assert "scoring" in text
    assert "6/6" in text
    assert "tokens/s" in text


def test_a_verb_called_in_a_process_leaves_its_signals_alone(cli: Callable[..., tuple[int, str, str]]) -> None:
    """A handler left behind ended the caller's process with 130, a minute after an interrupt of its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert cli("models")[0] == 0
    assert {number: signal.getsignal(number) for number in before} == before
