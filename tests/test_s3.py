"""The whole job on s3://: input and output, credentials and endpoint from the environment, also in the workers."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chaos.servers import Moto
from conftest import candidate_rows, job, nested, rows_of
from test_labels import content, exported, labels

from batch_rerank.calls import in_turn
from batch_rerank.config import JobConfig
from batch_rerank.errors import InputError, StorageError
from batch_rerank.job.run import run
from batch_rerank.job.staging import on_ray
from batch_rerank.job.staging import stage as stage_input
from batch_rerank.labels.export import export
from batch_rerank.publish.output import Place
from batch_rerank.publish.verify import verify
from batch_rerank.store.filesystem import list_files, locate

SECRET = "canary-secret-4711"


@pytest.fixture
def bucket(endpoint: Moto, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {**endpoint.environment, "AWS_SECRET_ACCESS_KEY": SECRET}.items():
        if "CHECKSUM" not in name:  # as users have it: with the client's defaults
            monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    name = f"bucket-{time.monotonic_ns()}"
    locate(f"s3://{name}").fs.mkdir(name)
    return name


def put_shards(bucket: str) -> None:
    fs = locate(f"s3://{bucket}").fs
    for shard in range(3):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(nested(candidate_rows(4, 25, first=4 * shard))), sink, row_group_size=3)
        fs.pipe_file(f"{bucket}/in/day=1/{shard}.parquet", sink.getvalue().to_pybytes())


def s3_job(bucket: str, **keys: Any) -> JobConfig:
    path = f"s3://{bucket}/in/*/*.parquet"
    return job(path, f"s3://{bucket}/out", input__layout="nested", **keys)


def download(bucket: str, directory: Path) -> Path:
    locate(f"s3://{bucket}").fs.get(f"{bucket}/out", str(directory), recursive=True)
    return directory


def test_the_ray_job_from_s3_to_s3_equals_the_local_one(
    bucket: str, nested_shards: Path, tmp_path: Path, local_ray: None
) -> None:
    put_shards(bucket)
    summary = run(s3_job(bucket))
    run(job(nested_shards, tmp_path / "local", input__layout="nested"), local=True)
    rows = rows_of(download(bucket, tmp_path / "s3"))
    assert rows.replace_schema_metadata() == rows_of(tmp_path / "local").replace_schema_metadata()
    assert (tmp_path / "s3" / "_SUCCESS").exists()
    assert summary.output == f"s3://{bucket}/out"
    assert verify(summary.output).problems == []


@pytest.mark.slow
def test_the_command_line_starts_its_own_ray_and_its_workers_reach_the_store(bucket: str, tmp_path: Path) -> None:
    put_shards(bucket)
    path = tmp_path / "job.yaml"
    path.write_text(s3_job(bucket).model_dump_json(exclude={"limit"}))
    command = [sys.executable, "-m", "batch_rerank.cli", "run", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["totals"]["rows_out"] == 300
    assert verify(f"s3://{bucket}/out").problems == []
    download(bucket, tmp_path / "s3")
    written = [file for file in (tmp_path / "s3").rglob("*") if file.is_file()]
    assert len(written) > 10
    for file in written:
        assert SECRET.encode() not in file.read_bytes(), f"{file} holds the secret"
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("local", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["local", "ray"])
def test_labels_are_exported_from_s3_to_s3_as_on_a_disk(
    bucket: str, local: bool, nested_shards: Path, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_shards(bucket)
    run(s3_job(bucket, output__top_k=3), local=True)
    run(job(nested_shards, tmp_path / "out", input__layout="nested"), local=True)
    monkeypatch.setattr("batch_rerank.labels.plan.SMALL_PAIRS", 0)  # on Ray, if it may
    for to in ("sentence-transformers", "flagembedding"):
        exported(tmp_path / "out", tmp_path / "disk" / to, to)
        place = f"s3://{bucket}/labels/{to}"
        settings = labels(Path("unused"), to).model_copy(update={"path": place})
        each = in_turn if local else on_ray(s3_job(bucket))
        there = export(Place(f"s3://{bucket}/out"), settings, each)
        assert there.rows and there.path == place
        locate(place).fs.get(place.removeprefix("s3://"), str(tmp_path / "s3" / to), recursive=True)
        assert content(tmp_path / "s3" / to) == content(tmp_path / "disk" / to)
        assert (tmp_path / "s3" / to / "_SUCCESS").exists()
        again = export(Place(f"s3://{bucket}/out"), settings, each)
        assert again.rows == there.rows and again.again


def test_a_job_on_s3_resumes_and_repairs(bucket: str, tmp_path: Path) -> None:
    put_shards(bucket)
    run(s3_job(bucket), local=True)
    fs = locate(f"s3://{bucket}").fs
    fs.rm_file(f"{bucket}/out/_manifest/receipts/00001-00000.json")
    fs.rm_file(f"{bucket}/out/part-00000.parquet")
    again = run(s3_job(bucket), local=True)
    assert (again.units, again.resumed_units) == (1, 8)
    assert verify(f"s3://{bucket}/out").problems == []


@pytest.mark.slow
def test_no_secret_is_written_or_shown(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials from the job file: none of them in the output, on the terminal, or in Ray's own logs."""
    put_shards(bucket)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    options = {"key": "testing", "secret": SECRET, "client_kwargs": {"region_name": "us-east-1"}}
    raw = s3_job(bucket).model_dump(exclude={"limit", "gate"})
    raw["input"]["storage_options"] = raw["output"]["storage_options"] = options
    shown, path = [], tmp_path / "job.yaml"
    sessions = set(Path("/tmp/ray").glob("session_2*"))

    def attempt(*arguments: str, **sections: dict[str, Any]) -> int:
        path.write_text(json.dumps({name: {**raw[name], **sections.get(name, {})} for name in raw}))
        command = [sys.executable, "-m", "batch_rerank.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        shown.extend([done.stdout, done.stderr])
        return done.returncode

    assert attempt("run", str(path), "--json") == 0
    assert attempt("plan", str(path), "--json") == 0
    assert attempt("verify", f"s3://{bucket}/out") == 6, "no plan has the options"
    assert [attempt(verb, str(path)) for verb in ("verify", "status")] == [0, 0]
    (tmp_path / "qrels").write_text("q0 0 d0 1\n")
    assert attempt("evaluate", "--run", str(path), "--qrels", str(tmp_path / "qrels")) == 0
    assert attempt("run", str(path), output={"top_k": 1}) == 4
    assert attempt("run", str(path), output={"path": f"s3://no-{bucket}/out"}) == 6
    assert attempt("run", str(path), input={"storage_options": SECRET}) == 2
    assert attempt("run", str(path), input={"storage_options": [SECRET]}) == 2
    assert attempt("run", str(path), input={"storage_option": options}) == 2
    assert attempt("run", str(path), input={"secret": SECRET}) == 2
    assert attempt("run", str(path), input={"storage_options": {"no_such": SECRET}}) == 2
    endpoint = f"http://me:{SECRET}@127.0.0.1:9"
    assert attempt("run", str(path), input={"storage_options": {**options, "endpoint_url": endpoint}}) == 6
    assert SECRET not in "".join(shown)
    download(bucket, tmp_path / "s3")
    logs = [file for session in set(Path("/tmp/ray").glob("session_2*")) - sessions for file in session.rglob("*.*")]
    written = [file for file in [*(tmp_path / "s3").rglob("*"), *logs] if file.is_file()]
    assert len(logs) > 10 and len(written) > len(logs) + 10
    for file in written:
        assert SECRET.encode() not in file.read_bytes(), f"{file} holds the secret"


def test_an_object_is_created_once(bucket: str) -> None:
    location = locate(f"s3://{bucket}/object")
    assert location.create_exclusive(b"first") is True
    assert location.create_exclusive(b"second") is False
    assert location.read_bytes() == b"first"


def test_a_missing_bucket_is_an_input_error(bucket: str) -> None:
    with pytest.raises(InputError, match="no shard matches"):
        run(job(f"s3://no-{bucket}/in/*.parquet", f"s3://{bucket}/out"), local=True)


def test_a_missing_output_bucket_is_a_storage_error(bucket: str) -> None:
    put_shards(bucket)
    config = job(f"s3://{bucket}/in/*/*.parquet", f"s3://no-{bucket}/out", input__layout="nested")
    with pytest.raises(StorageError, match=f"s3://no-{bucket}/out"):
        run(config, local=True)


def test_a_wrong_endpoint_fails_with_the_reason(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
        run(s3_job(bucket), local=True)


def test_globs_on_s3_that_begin_with_a_name(bucket: str) -> None:
    fs = locate(f"s3://{bucket}").fs
    for name in ("a/part-1.parquet", "a/part-2.parquet", "a/cart-3.parquet", "b/part-4.parquet", "a/part-5/x.parquet"):
        fs.pipe_file(f"{bucket}/{name}", b"x")
    for pattern, found in {
        "a/part-*.parquet": ["a/part-1.parquet", "a/part-2.parquet"],
        "a/*.parquet": ["a/cart-3.parquet", "a/part-1.parquet", "a/part-2.parquet"],
        "[ab]/part-[14].parquet": ["a/part-1.parquet", "b/part-4.parquet"],
        "a/pa?t-*/x*": ["a/part-5/x.parquet"],
        "a/**/x.parquet": ["a/part-5/x.parquet"],
        "c/part-*": [],
    }.items():
        names = [file.path.removeprefix(f"{bucket}/") for file in list_files(locate(f"s3://{bucket}/{pattern}"))]
        assert names == found, pattern
    with pytest.raises(InputError, match=r"a/p\*\*/x: not a glob"):
        list_files(locate(f"s3://{bucket}/a/p**/x"))


@pytest.mark.slow
def test_a_beir_folder_on_s3_is_staged_there_and_scored(bucket: str, local_ray: None, tmp_path: Path) -> None:
    rows = candidate_rows(6, 10)
    texts = {row["doc_id"]: row["text"] for row in rows}
    files = {
        "corpus.jsonl": [{"_id": doc_id, "title": "", "text": text} for doc_id, text in texts.items()],
        "queries.jsonl": [
            {"_id": query_id, "text": f"what is {query_id}"} for query_id in {r["query_id"] for r in rows}
        ],
    }
    contents = {name: "".join(json.dumps(one) + "\n" for one in lines) for name, lines in files.items()}
    contents["bm25.run"] = "".join(f"{r['query_id']} Q0 {r['doc_id']} 1 {r['score']} bm25\n" for r in rows)
    for name, lines in contents.items():
        locate(f"s3://{bucket}").fs.pipe_file(f"{bucket}/beir/{name}", lines.encode())
        (tmp_path / name).write_text(lines)
    outputs = []
    for root, out in ((f"s3://{bucket}/beir", f"s3://{bucket}/out"), (str(tmp_path), str(tmp_path / "local"))):
        given = {"layout": "beir", "path": root, "run": f"{root}/bm25.run", "unit_pairs": 20}
        raw = job("-", out, output__trec_run=True).model_dump(exclude={"input", "limit"})
        config = JobConfig.model_validate({**raw, "input": given})
        run(config)
        assert verify(out).problems == []
        place = stage_input(config, local=True).place
        assert place.startswith(f"{root}/_stage-"), "beside its sources"
        assert verify(place).problems == []
        outputs.append(out)
    assert rows_of(download(bucket, tmp_path / "s3")).equals(rows_of(outputs[1]))
    assert (tmp_path / "s3" / "_run.trec").read_bytes() == (tmp_path / "local" / "_run.trec").read_bytes()
    summary = run(
        config.model_copy(update={"output": config.output.model_copy(update={"top_k": 3, "path": f"{outputs[0]}-2"})})
    )
    assert summary.totals.rows_out == 18
    other = f"{bucket}-other"
    locate(f"s3://{other}").fs.mkdir(other)
    elsewhere = config.model_copy(
        update={
            "input": config.input.model_copy(
                update={"path": f"s3://{bucket}/beir", "run": f"s3://{bucket}/beir/bm25.run"}
            ),
            "output": config.output.model_copy(update={"path": f"s3://{other}/outs/one"}),
        }
    )
    found = stage_input(elsewhere, local=True)
    assert not found.reused, "the sources' bucket is not one that this job writes to"
    assert found.place.startswith(f"s3://{other}/outs/_stage-")
    two = elsewhere.model_copy(update={"output": config.output.model_copy(update={"path": f"s3://{other}/outs/two"})})
    assert stage_input(two, local=True).reused


def test_a_large_part_is_created_in_one_request(bucket: str) -> None:
    location = locate(f"s3://{bucket}") / "large"
    data = bytes(101 * 2**20)
    assert location.create_exclusive(data)
    assert "-" not in location.stat().version, "an etag of a multipart upload"
    assert not location.create_exclusive(b"other")
    assert location.stat().size == len(data)


def test_a_night_on_s3_reuses_the_one_before_through_its_pointer(bucket: str, tmp_path: Path) -> None:
    put_shards(bucket)
    given = f"s3://{bucket}/in/*/*.parquet"
    keys = {"input__layout": "nested", "output__latest": f"s3://{bucket}/out/LATEST.json", "reuse__from": "latest"}
    for night in ("2026-01-01", "2026-01-02"):
        totals = run(job(given, f"s3://{bucket}/out/{night}", **keys), local=True).totals
    assert totals.reused == totals.rows_in > 0
    by_glob = {"input__layout": "nested", "reuse__from": f"s3://{bucket}/out/2026-*", "input__unit_pairs": 7}
    assert run(job(given, f"s3://{bucket}/out/2026-01-03", **by_glob), local=True).totals.reused == totals.rows_in
    root = locate(f"s3://{bucket}/out")
    tables = [pq.read_table(io.BytesIO((root / f"2026-01-0{n}/part-00000.parquet").read_bytes())) for n in (1, 3)]
    assert tables[0].replace_schema_metadata() == tables[1].replace_schema_metadata()
    assert verify(f"s3://{bucket}/out/2026-01-03").problems == []


def test_the_report_lies_beside_an_output_on_s3(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import batch_rerank.report.write as report_write
    from batch_rerank.publish.output import Place
    from batch_rerank.report.page import page
    from batch_rerank.report.write import report

    monkeypatch.setattr(report_write, "LEAST_SECONDS", 60)  # to read texts, also on a busy machine
    put_shards(bucket)
    summary = run(s3_job(bucket, output__report=True), local=True)
    assert summary.report == f"s3://{bucket}/out/_report/report.html"
    root = locate(f"s3://{bucket}/out")
    data = (root / "_report/report.json").read_bytes()
    assert page(data) == (root / "_report/report.html").read_bytes()
    movers = json.loads(data)["movers"]
    assert len(movers["rows"]) == 20 and all(row["text"] for row in movers["rows"])
    assert SECRET.encode() not in data
    again = report(Place(f"s3://{bucket}/out"))
    assert again.content["counts"] == json.loads(data)["counts"]
    assert verify(f"s3://{bucket}/out").problems == []
