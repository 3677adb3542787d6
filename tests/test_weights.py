"""A model that lies in a store: found by small reads, fetched once a node, and never a mixture or a half."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from chaos.faultproxy import FaultProxy, Rule
from chaos.servers import Moto
from checkpoints import bert_embedding, bert_reranker, rewrite, xlmr_reranker
from conftest import job, rows_of

import batch_rerank.score.weights as weights_module
import batch_rerank.store.fetch as fetch_module
from batch_rerank import Reranker
from batch_rerank.config import JobConfig
from batch_rerank.engine import reranker as engine_reranker
from batch_rerank.engine.checkpoint import ModelSpec, resolve_model
from batch_rerank.errors import ConfigError, ModelError, StorageError
from batch_rerank.job.run import run
from batch_rerank.model_settings import Model
from batch_rerank.score.plan import configured_model, make_plan
from batch_rerank.score.weights import cache_of, find_model, on_this_node
from batch_rerank.store.filesystem import locate, storage_errors
from batch_rerank.store.manifest import Manifest

Cli = Callable[..., tuple[int, str, str]]
SECRET = "canary-secret-4711"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_reranker(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def bucket(endpoint: Moto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A bucket of this test's, and a hub cache, beside which the weights go."""
    enter(endpoint.environment, monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    name = f"bucket-{time.monotonic_ns()}"
    locate(f"s3://{name}").fs.mkdir(name)
    return name


def enter(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def put(directory: Path, bucket: str, name: str = "models/bert") -> str:
    """The model's URL, once it is there as anybody would copy it."""
    fs = locate(f"s3://{bucket}").fs
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        fs.pipe_file(f"{bucket}/{name}/{path.relative_to(directory)}", path.read_bytes())
    return f"s3://{bucket}/{name}"


def settings(url: str, **keys: Any) -> Model:
    return Model(name=url, **keys)


def planned(url: str, **keys: Any) -> ModelSpec:
    return resolve_model(url, stored=find_model(settings(url, **keys)))


def cached(tmp_path: Path) -> list[str]:
    """Names of all files of models in the cache."""
    return sorted(
        str(path).partition("/files/")[2] for path in (tmp_path / "hf/batch-rerank").glob("model-*/files/**/*")
    )


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


CHILD = """
import json, logging, sys
log = logging.getLogger("batch_rerank")
log.addHandler(logging.StreamHandler(sys.stderr))
log.setLevel(logging.INFO)
import batch_rerank.store.fetch as fetch
from batch_rerank.engine.checkpoint import resolve_model
from batch_rerank.model_settings import Model
from batch_rerank.score.weights import find_model, on_this_node
url, keys, first = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
fetch.PIECE, fetch.PIECES_AT_ONCE, fetch.FILES_AT_ONCE = 50_000, 1, 1
write, written = fetch._Part.write, []
def until(part, piece, data):
    write(part, piece, data)
    if part.wanted.name.endswith(".safetensors"):
        written.append(piece)
    if len(written) == first:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
fetch._Part.write = until
settings = Model(name=url, **keys)
spec = resolve_model(url, stored=find_model(settings))
spec, found = on_this_node(spec, settings)
print(json.dumps([found.size, spec.directory]))
"""


def child(url: str, killed_after: int = -1, **keys: Any) -> "subprocess.Popen[str]":
    """A process that fetches a model, in pieces of 50,000 bytes; or is killed after so many of its weights."""
    command = [sys.executable, "-c", CHILD, url, json.dumps(keys), str(killed_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result_of(process: "subprocess.Popen[str]") -> tuple[int, Path]:
    """Bytes that it has fetched besides the small files, and the model's directory."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    size, directory = json.loads(out)
    return size, Path(directory)


def fetched_by(process: "subprocess.Popen[str]") -> int:
    return result_of(process)[0]


# ---- what it is


def test_a_model_in_a_store_is_the_same_as_in_a_directory_and_its_weights_stay_there(
    bucket: str, model: Path, tmp_path: Path
) -> None:
    url = put(model, bucket)
    spec, local = planned(url), resolve_model(str(model))
    assert spec.identity == local.identity and spec.identity.startswith("sha256:")
    assert replace(spec, name="", directory="", files=()) == replace(local, name="", directory="")
    assert spec.name == url and sorted(name for name, *_ in spec.files) == sorted(
        path.name for path in model.iterdir() if path.suffix in (".json", ".txt", ".safetensors")
    )
    assert WEIGHTS not in cached(tmp_path) and "config.json" in cached(tmp_path)


def test_files_in_folders_are_of_the_model_too(bucket: str, tmp_path: Path) -> None:
    directory = bert_embedding(tmp_path / "embedding")
    spec = planned(put(directory, bucket))
    assert "1_Pooling/config.json" in [name for name, *_ in spec.files]
    assert (spec.kind, spec.identity) == ("bi_encoder", resolve_model(str(directory)).identity)


def test_what_a_token_costs_is_known_without_the_weights(bucket: str, model: Path) -> None:
    from batch_rerank.engine.work import Arithmetic

    spec = planned(put(model, bucket))
    assert Arithmetic.of(spec) == Arithmetic.of(resolve_model(str(model))) and Arithmetic.of(spec).per_token > 0


def test_a_second_look_reads_nothing_of_the_weights(bucket: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(model, bucket)
    first = planned(url)

    def refuse(*_: object) -> bytes:
        raise AssertionError("a read of the weights")

    monkeypatch.setattr("batch_rerank.score.weights.read_range", refuse)
    monkeypatch.setattr(fetch_module, "read_range", refuse)
    assert planned(url) == first


def test_two_places_with_names_that_begin_alike_are_two(bucket: str, model: Path) -> None:
    url = put(model, bucket)
    put(model, bucket, "models/bert-other")
    assert {name.partition("/")[0] for name, *_ in planned(f"{url}/").files} == {n for n, *_ in planned(url).files}


# ---- where it is used


def with_model(name: str, given: Path, out: Path | str, **keys: Any) -> JobConfig:
    raw = {"model__name": name, "model__kind": "auto", "model__max_length": 96, "cluster__cpus_per_actor": 1, **keys}
    return job(given, out, **raw)


@pytest.mark.slow
def test_a_job_scores_with_it_as_with_the_directory(
    bucket: str, model: Path, flat_shards: Path, tmp_path: Path, local_ray: None
) -> None:
    url = put(model, bucket)
    here = run(with_model(str(model), flat_shards, tmp_path / "here"), local=True)
    config = with_model(url, flat_shards, tmp_path / "ray", model__cache_dir=str(tmp_path / "node"))
    there = run(config)
    assert there.fingerprint == here.fingerprint
    columns = ["query_id", "doc_id", "rank", "n_tokens"]
    assert rows_of(tmp_path / "ray").select(columns).equals(rows_of(tmp_path / "here").select(columns))
    found = Manifest(locate(str(tmp_path / "ray")))
    receipts = [json.loads(line) for line in receipts_of(found)]
    assert sum(one["fetched_bytes"] for one in receipts) == (model / WEIGHTS).stat().st_size
    plan = json.loads((tmp_path / "ray/_manifest/plan.json").read_text())
    assert plan["model"]["name"] == url and WEIGHTS in [one[0] for one in plan["model"]["files"]]
    again = run(with_model(url, flat_shards, tmp_path / "local"), local=True)
    assert again.fingerprint == here.fingerprint
    assert rows_of(tmp_path / "local").select(columns).equals(rows_of(tmp_path / "here").select(columns))


def receipts_of(manifest: Manifest) -> list[str]:
    root = Path(str(manifest.root)) / "_manifest/receipts"
    return [line for path in root.iterdir() for line in path.read_text().splitlines()]


def test_plan_bench_and_selftest_take_it(bucket: str, model: Path, flat_shards: Path, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(with_model(put(model, bucket), flat_shards, tmp_path / "out").model_dump_json(exclude={"limit"}))
    code, out, error = cli("plan", path, "--local", "--json")
    assert code == 0, error
    assert json.loads(out)["model"]["name"].startswith("s3://") and WEIGHTS not in cached(tmp_path)
    code, out, error = cli("bench", path, "--local", "--seconds", 1, "--json")
    assert code == 0 and json.loads(out)["flop"] > 0, error
    code, _, error = cli("selftest", path)
    assert code == 0, error


def test_a_reranker_takes_it(bucket: str, model: Path) -> None:
    url = put(model, bucket)
    there, here = Reranker(url, max_length=96, device="cpu"), Reranker(str(model), max_length=96, device="cpu")
    pairs = [("what is the capital", "Paris"), ("what is the capital", "a river")]
    assert np.array_equal(there.score(pairs), here.score(pairs))
    assert isinstance(there, engine_reranker.Reranker)
    with pytest.raises(ConfigError, match=r"model\.revision: found 'main', but what lies at s3://"):
        resolve_model(url, revision="main", stored=find_model(settings(url)))


# ---- once a node


def test_processes_that_race_for_it_fetch_it_once(bucket: str, model: Path, tmp_path: Path) -> None:
    url = put(model, bucket)
    spec = planned(url)
    key = Path(spec.directory).parent.name
    with cache_of(settings(url)).alone(f"{key}.weights", "the test"):
        racing = [child(url) for _ in range(2)]
        for process in racing:
            assert process.stderr is not None
            assert "another process of this node is at it, waiting" in process.stderr.readline()
        assert WEIGHTS not in cached(tmp_path)
    assert sorted(map(fetched_by, racing)) == [0, (model / WEIGHTS).stat().st_size]
    _, found = on_this_node(spec, settings(url))
    assert found is not None and found.size == 0


def test_killed_while_it_fetches_the_next_process_fetches_the_rest(bucket: str, model: Path, tmp_path: Path) -> None:
    url = put(model, bucket)
    killed = child(url, killed_after=3)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert WEIGHTS not in cached(tmp_path), "a half of it has its name"
    assert fetched_by(child(url)) == (model / WEIGHTS).stat().st_size - 3 * 50_000
    placed, found = on_this_node(planned(url), settings(url))
    assert found is not None and found.size == 0
    assert (Path(placed.directory) / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert list((Path(placed.directory).parent / "parts").iterdir()) == []


def test_what_lies_in_the_cache_and_is_damaged_is_fetched_again(bucket: str, model: Path, logged: list[str]) -> None:
    url = put(model, bucket)
    placed, _ = on_this_node(planned(url), settings(url))
    kept = Path(placed.directory) / WEIGHTS
    kept.write_bytes(kept.read_bytes()[:-1] + b"\xff")
    _, found = on_this_node(planned(url), settings(url))
    assert found is not None and found.size >= (model / WEIGHTS).stat().st_size
    assert kept.read_bytes() == (model / WEIGHTS).read_bytes()
    assert any("is fetched again" in line for line in logged)
    kept.write_bytes(kept.read_bytes()[:-5])
    _, found = on_this_node(planned(url), settings(url))
    assert found is not None and found.size == (model / WEIGHTS).stat().st_size


@pytest.mark.parametrize("lost", [False, True])
def test_a_tokenizer_that_changed_in_the_cache_is_fetched_again(
    bucket: str, model: Path, tmp_path: Path, logged: list[str], lost: bool
) -> None:
    """Two words change places: as many bytes, other scores. With another small file lost it is no newer version."""
    url = put(model, bucket)
    spec = planned(url)
    (tokenizer,) = (tmp_path / "hf/batch-rerank").glob("model-*/files/tokenizer.json")
    words = json.loads(tokenizer.read_bytes())
    vocabulary = words["model"]["vocab"]
    one, other = [name for name, number in vocabulary.items() if 10 <= number < 100][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    whole = tokenizer.read_bytes()
    tokenizer.write_bytes(json.dumps(words).encode().ljust(len(whole))[: len(whole)])
    if lost:
        (tokenizer.parent / "config.json").unlink()
    here, _ = on_this_node(spec, settings(url), weights=False)
    assert tokenizer.read_bytes() == whole and Path(here.directory) == tokenizer.parent
    assert [line for line in logged if "tokenizer.json" in line and "not what came, as kept.json says" in line]
    tokenizer.write_bytes(whole[: len(whole) // 2].ljust(len(whole)))  # not even JSON
    assert planned(url).identity == spec.identity and tokenizer.read_bytes() == whole
    for record in (b"{", b"[" * 100_000, b"\xff", b"[]"):
        (tokenizer.parent.parent / "kept.json").write_bytes(record)
        assert planned(url).identity == spec.identity and tokenizer.read_bytes() == whole
    logged.clear()
    on_this_node(spec, settings(url), weights=False)
    assert logged == []


def test_a_full_disk_is_no_traceback_where_all_is_there(
    bucket: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(model, bucket)
    planned(url)
    (kept,) = (tmp_path / "hf/batch-rerank").glob("model-*/kept.json")
    kept.unlink()  # as an earlier version has left it

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_module, "place_file", full)
    with pytest.raises(StorageError, match=r"kept.json: storage failed: No space left"):
        planned(url)


def test_the_cache_drops_what_was_used_longest_ago_and_nothing_that_is_in_use(
    bucket: str, model: Path, logged: list[str]
) -> None:
    urls = [put(model, bucket, f"models/{name}") for name in ("first", "second", "third", "fourth")]
    keys = {"cache_bytes": int(2.5 * on_disk(model))}

    def use(url: str) -> Path:
        return Path(on_this_node(planned(url, **keys), settings(url, **keys))[0].directory)

    first, second = use(urls[0]), result_of(child(urls[1], **keys))[1]  # whose process has ended
    locks = cache_of(settings(urls[0])).root / "locks"
    os.utime(locks / f"{first.parent.name}.use", (1, 1))
    (locks.parent / "model-of-mine").mkdir()  # a name that is not ours
    third = use(urls[2])
    assert [path.exists() for path in (first, second, third)] == [True, False, True]
    assert [line.partition(":")[0] for line in logged if "last used longest ago" in line] == [str(second.parent)]
    fourth = use(urls[3])
    assert all((path / WEIGHTS).exists() for path in (first, third, fourth))
    assert any(f"all in use, are more than model.cache_bytes: {keys['cache_bytes']:,}" in line for line in logged)
    left = {path.name for path in locks.parent.iterdir()}
    assert left == {"locks", "model-of-mine", *(path.parent.name for path in (first, third, fourth))}


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
    bucket: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(model, bucket)
    spec = planned(url)
    monkeypatch.setattr("batch_rerank.store.node_cache.NodeCache._free", lambda cache: 1000)
    with pytest.raises(
        StorageError, match=r"1,000 bytes are free, and [\d,]+ are needed; make room there, or set model"
    ):
        on_this_node(spec, settings(url))


# ---- what is wrong with it


def test_an_object_that_is_cut_short_is_seen_by_the_plan(bucket: str, model: Path, flat_shards: Path) -> None:
    url = put(model, bucket)
    locate(url).fs.pipe_file(f"{url[5:]}/{WEIGHTS}", (model / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"{url}/{WEIGHTS}: found [\d,]+ bytes, expected [\d,]+ bytes by its header"):
        make_plan(with_model(url, flat_shards, flat_shards.parent / "out"))


def other_weights(model: Path) -> bytes:
    """As long as the model's own, and others."""
    data = bytearray((model / WEIGHTS).read_bytes())
    data[-4000:] = data[-8000:-4000]
    assert bytes(data) != (model / WEIGHTS).read_bytes()
    return bytes(data)


@pytest.mark.parametrize("cut", [0, 60_000])
def test_a_model_that_is_replaced_after_the_plan_is_refused(bucket: str, model: Path, tmp_path: Path, cut: int) -> None:
    url = put(model, bucket)
    spec = planned(url)
    locate(url).fs.pipe_file(f"{url[5:]}/{WEIGHTS}", other_weights(model)[cut:])
    with pytest.raises(ModelError, match=r"as it was when the job was planned; the model was replaced meanwhile"):
        on_this_node(spec, settings(url))
    assert WEIGHTS not in cached(tmp_path)
    other = put(model, bucket)  # the same bytes again, as the plan has them
    assert on_this_node(planned(other), settings(url))[0].identity == spec.identity


@pytest.mark.parametrize("cut", [0, 200_000])
def test_a_model_that_is_replaced_while_it_is_fetched_is_no_mixture(
    bucket: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    url = put(model, bucket)
    spec = planned(url)
    monkeypatch.setattr(fetch_module, "PIECE", 50_000)
    monkeypatch.setattr(fetch_module, "PIECES_AT_ONCE", 1)
    write = fetch_module._Part.write

    def replaced(part: Any, piece: int, data: bytes) -> None:
        write(part, piece, data)
        if piece == 1:
            locate(url).fs.pipe_file(f"{url[5:]}/{WEIGHTS}", other_weights(model)[cut:])

    monkeypatch.setattr(fetch_module._Part, "write", replaced)
    with pytest.raises(ModelError, match="the model was replaced meanwhile"):
        on_this_node(spec, settings(url))
    assert WEIGHTS not in cached(tmp_path)
    monkeypatch.undo()


def test_what_came_of_a_replacement_is_gone_when_the_version_is_put_back(
    bucket: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(model, bucket)
    spec, whole = planned(url), (model / WEIGHTS).read_bytes()
    monkeypatch.setattr(fetch_module, "PIECE", 50_000)
    monkeypatch.setattr(fetch_module, "PIECES_AT_ONCE", 1)
    write = fetch_module._Part.write

    def replaced(part: Any, piece: int, data: bytes) -> None:
        write(part, piece, data)
        if part.wanted.name == WEIGHTS and piece == 1:  # by one that is shorter, whose end is not reached
            locate(url).fs.pipe_file(f"{url[5:]}/{WEIGHTS}", whole[len(whole) // 4 :])

    with monkeypatch.context() as patch, pytest.raises(ModelError, match="put that version back"):
        patch.setattr(fetch_module._Part, "write", replaced)
        on_this_node(spec, settings(url))
    put(model, bucket)
    placed, found = on_this_node(spec, settings(url))
    assert (Path(placed.directory) / WEIGHTS).read_bytes() == whole
    assert found is not None and found.size == len(whole) - 2 * 50_000, "the pieces of its own version are kept"


def test_an_identity_is_of_one_version(bucket: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(model, bucket)
    read = weights_module.read_range

    def replaced(*given: Any) -> bytes:
        monkeypatch.setattr(weights_module, "read_range", read)
        locate(url).fs.pipe_file(f"{url[5:]}/{WEIGHTS}", other_weights(model))
        return read(*given)

    monkeypatch.setattr(weights_module, "read_range", replaced)
    with pytest.raises(ModelError, match="replaced meanwhile"):
        find_model(settings(url))
    put(model, bucket)
    assert planned(url).identity == resolve_model(str(model)).identity, "what was read of the other was kept"


def test_what_is_missing_is_named(bucket: str, model: Path, tmp_path: Path, flat_shards: Path, cli: Cli) -> None:
    url = put(model, bucket)
    fs = locate(url).fs
    path = tmp_path / "job.yaml"

    def ends(name: str, *said: str, **environment: str) -> int:
        path.write_text(with_model(name, flat_shards, tmp_path / "out").model_dump_json(exclude={"limit"}))
        code, _, error = cli("plan", path, "--local")
        assert "Traceback" not in error and [part for part in said if part not in error] == [], error
        return code

    assert ends(f"s3://{bucket}/models", "no config.json there") == 5
    assert ends(f"s3://no-{bucket}/models", "no config.json there", "check the bucket") == 5
    assert ends(f"s3://{bucket}", "no config.json there") == 5
    fs.rm_file(f"{url[5:]}/tokenizer.json")
    assert ends(url, f"{url}: no tokenizer.json") == 5
    fs.rm_file(f"{url[5:]}/{WEIGHTS}")
    assert ends(url, f"{url}: found no weights") == 5
    fs.pipe_file(f"{url[5:]}/pytorch_model.bin", b"x")
    assert ends(url, "only pickled weights (pytorch_model.bin)") == 5
    fs.rm_file(f"{url[5:]}/config.json")
    assert ends(url, "no config.json there") == 5


def test_an_index_of_another_form_is_named(bucket: str, model: Path) -> None:
    url = put(model, bucket)
    for weight_map, said in (({"a": ["x"]}, r"names \[\"\['x'\]\"\]"), ([], "no weight_map"), (None, "no weight_map")):
        index = json.dumps({"weight_map": weight_map}).encode()
        locate(url).fs.pipe_file(f"{url[5:]}/{WEIGHTS}.index.json", index)
        with pytest.raises(ModelError, match=said):
            planned(url)


def test_a_host_that_no_name_server_knows_is_no_fault_of_the_model() -> None:
    import aiohttp

    with pytest.raises(StorageError), storage_errors("gs://bucket/m", ModelError):
        raise aiohttp.ClientOSError(5, "Name or service not known")


def test_a_store_that_is_away_is_storage(
    bucket: str, flat_shards: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, monkeypatch)
    config = with_model(f"s3://{bucket}/m", flat_shards, tmp_path / "out")
    (tmp_path / "job.yaml").write_text(config.model_dump_json(exclude={"limit"}))
    code, _, error = cli("plan", tmp_path / "job.yaml", "--local")
    assert code == 6 and "127.0.0.1:9" in error


def test_no_key_of_a_store_leads_out_of_the_cache(bucket: str, model: Path, tmp_path: Path) -> None:
    url = put(model, bucket)
    s3 = locate(url).fs
    s3.call_s3("put_object", Bucket=bucket, Key="models/bert/../../../evil.json", Body=b"{}")
    with pytest.raises(ModelError, match="expected names below the place"):
        planned(url)
    assert not list(tmp_path.rglob("evil.json"))


def test_a_cache_that_cannot_be_written_is_a_setting(bucket: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"model\.cache_dir: .*file cannot be written"):
        planned(put(model, bucket), cache_dir=str(tmp_path / "file"))


def test_a_store_that_fails_is_waited_for_and_the_repeats_are_counted(
    endpoint: Moto, bucket: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(model, bucket)
    spec = planned(url)
    monkeypatch.setattr("batch_rerank.store.patience.FIRST_PAUSE", 0.01)
    with FaultProxy(endpoint.url) as proxy:
        enter(proxy.environment, monkeypatch)
        proxy.set(Rule("truncate", "GET", WEIGHTS, times=6))  # one more than s3fs tries
        placed, found = on_this_node(spec, settings(url))
        assert found is not None and found.retries == 1
        assert proxy.hits() == {"truncate": 6}
    assert (Path(placed.directory) / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


# ---- secrets


def test_no_secret_of_a_model_is_written_or_shown(
    bucket: str, model: Path, flat_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, shown = put(model, bucket), []
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    raw = with_model(url, flat_shards, tmp_path / "out").model_dump(exclude={"limit", "gate"}, mode="json")
    options = {"key": "testing", "secret": SECRET}

    def attempt(*arguments: str, **keys: Any) -> int:
        raw["model"] |= keys
        (tmp_path / "job.yaml").write_text(json.dumps(raw))
        command = [sys.executable, "-m", "batch_rerank.cli", *arguments, str(tmp_path / "job.yaml")]
        done = subprocess.run([*command, "--local"], capture_output=True, text=True, timeout=120)
        shown.extend([done.stdout, done.stderr])
        return done.returncode

    assert attempt("run", storage_options=options) == 0, shown
    assert attempt("plan", storage_options={**options, "no_such": SECRET}) == 2
    assert attempt("plan", storage_options=[SECRET]) == 2
    assert attempt("plan", name=f"s3://me:{SECRET}@{bucket}/m", storage_options={}) == 2
    assert attempt("plan", name=f"s3://{SECRET}:x@{bucket}/m") == 2
    endpoint = f"http://me:{SECRET}@127.0.0.1:9"
    assert attempt("plan", name=url, storage_options={**options, "endpoint_url": endpoint}) == 6, shown
    with pytest.raises(ConfigError) as caught:
        Reranker(f"s3://me:{SECRET}@{bucket}/m")
    assert SECRET not in "".join([*shown, str(caught.value)])
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "job.yaml"]
    assert len(written) > 20
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "hf://owner/name"}, "the hub id alone"),
        ({"name": "file:///models/x"}, "the path alone"),
        ({"name": "http://host/x"}, "expected a local path, s3://"),
        ({"name": "s3://b/x", "cache_dir": "s3://b/cache"}, "expected an absolute path"),
        ({"name": "s3://b/x", "cache_bytes": 0}, "greater than or equal to 1"),
        ({"name": "owner/name", "storage_options": {"anon": True}}, "are for a model in a store"),
    ],
)
def test_settings_that_make_no_sense_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job("in", "out", **{f"model__{name}": value for name, value in keys.items()})


def test_a_model_of_a_job_is_found_with_its_own_options(bucket: str, model: Path, flat_shards: Path) -> None:
    url = put(model, bucket)
    options = {"key": "testing", "secret": SECRET, "client_kwargs": {"region_name": "us-east-1"}}
    config = with_model(url, flat_shards, flat_shards.parent / "out", model__storage_options=options)
    spec = configured_model(config)
    assert spec.identity == resolve_model(str(model)).identity
    assert SECRET not in repr(config) + config.model_dump_json() + repr(spec)
    shutil.rmtree(Path(spec.directory).parent)
    placed, found = on_this_node(spec, config.model)
    assert found is not None and found.size == sum(size for _, size, *_ in spec.files)
    assert (Path(placed.directory) / WEIGHTS).exists()


def test_another_model_of_the_same_shape_is_another_one(bucket: str, tmp_path: Path) -> None:
    first = xlmr_reranker(tmp_path / "xlmr")
    url = put(first, bucket, "models/xlmr")
    before = planned(url)
    (first / WEIGHTS).write_bytes(other_weights(first))
    assert planned(put(first, bucket, "models/xlmr")).identity != before.identity
    rewrite(first / "config.json", comment="changed")
    assert planned(put(first, bucket, "models/xlmr")).identity == resolve_model(str(first)).identity
