"""Small real inputs, and one Ray for the tests that need one."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings

from batch_rerank.config import JobConfig, parse_config

if TYPE_CHECKING:
    from chaos.servers import Moto

# the same examples every time, and as long as a busy machine takes; a test's own settings come before these
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for one that has no core leave theirs
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 if not told: other tests' processes would starve Ray's
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

Row = dict[str, Any]
WORDS = ("alpha", "beta", "gamma", "delta", "größe", "北京", "def f(x):", "return x")


def candidate_rows(queries: int, candidates: int, first: int = 0) -> list[Row]:
    """Flat rows of `queries` queries with `candidates` documents each; documents repeat between queries."""
    return [
        {
            "query_id": f"q{query}",
            "query": f"what is {WORDS[query % len(WORDS)]} {query}",
            "doc_id": f"d{document}",
            "text": f"{WORDS[document % len(WORDS)]} " * (1 + (document * 7 + query) % 20),
            "score": float(candidates - document),
            "lang": WORDS[document % 3],
        }
        for query in range(first, first + queries)
        for document in range(candidates)
    ]


def nested(rows: list[Row]) -> list[Row]:
    """Flat rows as a row per query."""
    queries: dict[str, Row] = {}
    for row in rows:
        top = {key: row[key] for key in ("query_id", "query", "instruction") if key in row}
        query = queries.setdefault(row["query_id"], {**top, "candidates": []})
        query["candidates"].append({key: value for key, value in row.items() if key not in top})
    return list(queries.values())


def write(path: Path, rows: list[Row], row_group_size: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def rows_of(output: str | Path) -> pa.Table:
    """An output's rows in order, as a reader gets them: a plain glob of the parts."""
    return pa.concat_tables([pq.read_table(part) for part in sorted(Path(output).glob("part-*.parquet"))])


def job(input_path: str | Path, output: str | Path, **keys: Any) -> JobConfig:
    """A job of the free scorer, which ends without a report; `keys` are section__key=value."""
    raw: dict[str, Any] = {
        "input": {"layout": "flat", "path": str(input_path), "unit_pairs": 40},
        "output": {"path": str(output), "report": False},
        "model": {"name": "none", "kind": "checksum"},
        "cluster": {"actors": 2, "gpus_per_actor": 0, "cpus_per_actor": 1},
    }
    for key, value in keys.items():
        section, _, name = key.partition("__")
        raw.setdefault(section, {})[name] = value
    return parse_config(raw, "test")


SLOW = (
    "run_ray",
    "docs",
    "chaos",
    "reuse",
    "poison",
    "s3",
    "ray_job",
    "stage",
    "labels",
    "resume",
    "hostile",
    "selftest",
)
"""Files that take long, the longest first: several processes that each take a file at a time end together then."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program catches it."""


def scored_only(config: JobConfig) -> Path:
    """The output of a job that is stopped where all its units are scored and nothing is published."""
    import batch_rerank.job.run as run_module

    def stop(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module, "finish", stop)
        run_module.run(config, local=True)
    return Path(config.output.path)


@pytest.fixture
def flat_shards(tmp_path: Path) -> Path:
    """Three flat shards of 4 queries with 25 candidates each; row groups cut through queries."""
    for shard in range(3):
        write(tmp_path / "flat" / f"{shard}.parquet", candidate_rows(4, 25, first=4 * shard), row_group_size=33)
    return tmp_path / "flat"


@pytest.fixture
def nested_shards(tmp_path: Path) -> Path:
    """The same candidates as `flat_shards`, nested, three queries a row group."""
    for shard in range(3):
        rows = nested(candidate_rows(4, 25, first=4 * shard))
        write(tmp_path / "nested" / f"{shard}.parquet", rows, row_group_size=3)
    return tmp_path / "nested"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: the models of the tests are so small that they are slower on more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def endpoint() -> Iterator["Moto"]:
    """An S3 server."""
    from chaos.servers import Moto

    with Moto() as server:
        yield server


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for the whole session: jobs in this process use it as it is."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"metrics_report_interval_ms": 3000},  # tests of metrics wait for a report
    )
    yield
    ray.shutdown()


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged from now on. caplog sees a record twice or not at all after a verb has run in this process."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    log = logging.getLogger("batch_rerank")
    monkeypatch.setattr(log, "handlers", [*log.handlers, Keep()])
    log.setLevel(logging.INFO)
    return messages


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: exit code, stdout, stderr."""
    from batch_rerank.cli import app

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            app([str(argument) for argument in arguments])
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call
