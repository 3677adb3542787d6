"""Progress: a bar on a terminal, plain lines elsewhere, the same numbers in both."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import job

from batch_rerank.job.progress import Display, Left, Meter, duration
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


def pace(meter: Meter, totals: Totals, steps: np.ndarray, pairs: int) -> None:
    """A unit of so many pairs after each step of seconds."""
    for now in np.cumsum(steps):
        totals.rows_in += pairs
        meter.add(float(now), totals)


@pytest.mark.parametrize(("seen", "rest"), [(8, 8), (30, 300), (500, 500), (2000, 100)])
@pytest.mark.parametrize("spread", [0.1, 1.0], ids=["even", "uneven"])
def test_the_interval_of_what_is_left_has_it_in_nine_of_ten_runs(seen: int, rest: int, spread: float) -> None:
    """Units of gamma-distributed seconds. At 95 % fewer than 180 of 200 would be a chance of 0.3 %; seeds are fixed."""
    hits = 0
    for seed in range(200):
        meter = Meter()
        steps = np.random.default_rng(seed).gamma(1 / spread**2, 20 * spread**2, seen + rest) + 1
        pace(meter, Totals(), steps[:seen], 100)
        left = meter.left(rest * 100)
        assert left is not None
        assert left.low <= left.seconds <= left.high < np.inf
        hits += bool(left.low <= steps[seen:].sum() <= left.high)
    assert hits >= 180, hits


def test_an_even_pace_has_an_interval_of_nothing_and_a_slower_one_is_noticed() -> None:
    meter, totals = Meter(), Totals()
    pace(meter, totals, np.full(100, 2.0), 50)
    assert meter.left(1000) == Left(40, 40, 40)
    for now in range(205, 705, 5):
        totals.rows_in += 50
        meter.add(now, totals)
    left = meter.left(1000)
    assert left is not None
    assert left.seconds == pytest.approx(100)
    assert meter.left(0) == Left(0, 0, 0)


def test_units_that_end_together_are_no_scatter() -> None:
    meter, totals = Meter(), Totals()
    for burst in range(30):
        for actor in range(8):
            totals.rows_in += 100
            meter.add(100 + 20 * burst + actor * 0.01, totals)
    left = meter.left(8000)
    assert left is not None
    assert left.high - left.low < 0.05 * left.seconds


def test_the_line_says_what_is_known(logged: list[str]) -> None:
    totals = Totals(rows_in=100, tokens=1000, seconds=50.0, compute_seconds=50.0)  # an earlier run's
    display = Display(4, 1000, totals, usd_per_gpu_hour=36.0)
    assert display.rates() == "-- pairs/s"
    for now in range(3):
        totals.rows_in, totals.tokens = totals.rows_in + 100, totals.tokens + 2000
        totals.gpu_seconds, totals.wait_seconds = totals.gpu_seconds + 100, totals.wait_seconds + 1
        totals.seconds, totals.compute_seconds = totals.seconds + 4, totals.compute_seconds + 3
        display.meter.add(100.0 + 100 * now, totals)
    assert display.rates() == "1 pairs/s  20 tokens/s  computing 60% of the time  ETA 10:00  $3.00 so far"


def test_hours_are_shown_as_hours() -> None:
    assert [duration(seconds) for seconds in (0, 59.9, 725, 3600, 21600, 360000)] == [
        "0:00",
        "0:59",
        "12:05",
        "1:00:00",
        "6:00:00",
        "100:00:00",
    ]


def test_a_run_in_which_nothing_is_scored_has_no_share_and_no_price() -> None:
    totals = Totals()
    display = Display(2, 200, totals)
    for now in range(2):
        totals.rows_in += 100
        display.meter.add(float(now), totals)
    assert display.rates() == "100 pairs/s  0 tokens/s  ETA 0:00"


@pytest.fixture
def command(flat_shards: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "job.yaml").write_text(job(flat_shards, tmp_path / "out").model_dump_json(exclude={"limit"}))
    return [sys.executable, "-m", "batch_rerank.cli", "run", str(tmp_path / "job.yaml"), "--local"]


def test_without_a_terminal_there_are_plain_lines(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(
        r"^\S+Z 6/6 units  300/300 pairs  [\d,]+ pairs/s  [\d,]+ tokens/s  computing \d+% of the time  ETA 0:00$",
        done.stderr,
        re.MULTILINE,
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
