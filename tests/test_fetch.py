"""`batch-rerank fetch`: a model's copy in a store is there whole or not at all, and says what it is."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import bert_reranker, qwen3_reranker, xlmr_reranker
from conftest import Killed
from test_weights import bucket  # noqa: F401  (a fixture)

import batch_rerank.store.mirror as mirror_module
from batch_rerank import Reranker
from batch_rerank.engine import checkpoint_files
from batch_rerank.engine.checkpoint import ModelSpec, resolve_model
from batch_rerank.errors import ConfigError, ConflictError, ModelError, StorageError
from batch_rerank.model_settings import Model
from batch_rerank.score.weights import find_model, mirror_model, on_this_node
from batch_rerank.store.filesystem import locate
from batch_rerank.store.mirror import Done

Cli = Callable[..., tuple[int, str, str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_reranker(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def place(bucket: str) -> str:  # noqa: F811
    """Where a model may go."""
    return f"s3://{bucket}/models/one"


@pytest.fixture
def hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model in the hub's cache, whose id alone says which template it has."""
    repository = tmp_path / "hf/hub/models--zeroentropy--zerank-1"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(qwen3_reranker(tmp_path / "built"), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "zeroentropy/zerank-1"


def copied(name: str | Path, to: str, **keys: Any) -> Done:
    return mirror_model(str(name), to, **{"revision": None, "allow_pickle": False, "replacing": False, **keys})


def planned(url: str, **keys: Any) -> ModelSpec:
    return resolve_model(url, stored=find_model(Model(name=url)), **keys)


def names(place: str) -> list[str]:
    found = locate(place)
    return sorted(path[len(found.path) + 1 :] for path in found.find())


def killed_after(files: int, model: Path, place: str, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> None:
    """Copy, and die after so many files."""
    put, done = mirror_module._put, []

    def until(*given: Any) -> str:
        if len(done) == files:
            raise Killed
        done.append(put(*given))
        return done[-1]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mirror_module, "_put", until)
        copied(model, place, **keys)


def test_a_directory_in_a_store_is_the_same_model(place: str, model: Path, cli: Cli) -> None:
    code, out, error = cli("fetch", model, place, "--json")
    assert code == 0, error
    done = json.loads(out)
    assert done["identity"] == resolve_model(str(model)).identity and done["kept"] == 0
    spec = planned(place)
    assert replace(spec, name="", directory="", files=()) == replace(resolve_model(str(model)), name="", directory="")
    assert all(sha256 for _, _, _, sha256 in spec.files)
    assert Reranker(place, max_length=96, device="cpu").score([("q", "d")]).shape == (1,)
    code, out, error = cli("fetch", model, place, "--json")
    assert code == 0 and json.loads(out)["size"] == 0 and json.loads(out)["kept"] == json.loads(out)["files"]


def test_a_hub_model_in_a_store_is_that_commit_and_has_its_template(place: str, hub_model: str) -> None:
    copied(hub_model, place)
    there, here = planned(place), resolve_model(hub_model)
    assert (there.identity, there.template) == (f"commit:{COMMIT}", "zerank") == (here.identity, here.template)
    assert there.max_length == here.max_length
    assert planned(place, revision=COMMIT) == there
    with pytest.raises(ConfigError, match=r"model\.revision: found 'main'"):
        planned(place, revision="main")
    placed, _ = on_this_node(there, Model(name=place))
    assert (Path(placed.directory) / WEIGHTS).stat().st_size > 10_000


def test_a_hub_model_on_a_disk_has_its_template_too(place: str, hub_model: str, tmp_path: Path) -> None:
    copied(hub_model, str(tmp_path / "copy"))
    here, there = resolve_model(hub_model), resolve_model(str(tmp_path / "copy"))
    assert here.template == "zerank" and (there.template, there.max_length) == (here.template, here.max_length)
    copied(tmp_path / "copy", place)
    assert planned(place).template == "zerank", "nor is it lost with the second copy"


def test_a_hub_model_that_is_damaged_in_the_cache_is_fetched_again(place: str, hub_model: str) -> None:
    copied(hub_model, place)
    placed, _ = on_this_node(planned(place), Model(name=place))
    kept = Path(placed.directory) / WEIGHTS
    whole = kept.read_bytes()
    _, found = on_this_node(planned(place), Model(name=place))
    assert found is not None and found.size == 0
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    _, found = on_this_node(planned(place), Model(name=place))
    assert found is not None and found.size > 0 and kept.read_bytes() == whole


@pytest.mark.parametrize("files", [0, 1, 3])
def test_killed_it_is_not_there_and_the_same_command_goes_on(
    place: str, model: Path, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(files, model, place, monkeypatch)
    assert "_MIRROR" not in names(place)
    with pytest.raises(ModelError, match=f"{place}: a mirror that is not finished; expected _MIRROR"):
        planned(place)
    done = copied(model, place)
    assert done.kept == files and done.size == sum(size for _, size, *_ in planned(place).files) - kept_bytes(
        model, files
    )
    assert "_MIRROR.unfinished" not in names(place)


def kept_bytes(model: Path, files: int) -> int:
    sizes = [
        path.stat().st_size for path in sorted(model.iterdir()) if path.suffix in (".json", ".txt", ".safetensors")
    ]
    return sum(sizes[:files])


def test_killed_before_its_mark_goes_the_copy_is_there(
    place: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batch_rerank.store.filesystem import Location

    remove = Location.remove

    def die(location: Location) -> None:
        if location.name == "_MIRROR.unfinished":
            raise Killed
        remove(location)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Location, "remove", die)
        copied(model, place)
    assert planned(place).identity == resolve_model(str(model)).identity
    assert copied(model, place).size == 0
    assert "_MIRROR.unfinished" not in names(place)


def test_files_beside_the_copy_are_not_of_the_model(place: str, model: Path) -> None:
    copied(model, place)
    before = planned(place)
    locate(place).fs.pipe_file(f"{place[5:]}/training.json", b"{}")
    locate(place).fs.pipe_file(f"{place[5:]}/adapter_config.json", b"{}")
    assert planned(place) == before


def test_another_model_does_not_take_its_place_unless_it_is_told_to(
    place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    copied(model, place)
    other = xlmr_reranker(tmp_path / "xlmr")
    code, _, error = cli("fetch", other, place)
    assert code == 4 and "replace what is there with --replace" in error
    killed_after(2, other, place, monkeypatch, replacing=True)
    with pytest.raises(ModelError, match="not finished"):
        planned(place)
    with pytest.raises(ConflictError):
        copied(model, place)
    assert copied(other, place).kept == 2
    assert planned(place).identity == resolve_model(str(other)).identity
    code, _, error = cli("fetch", model, place, "--replace")
    assert code == 0, error
    assert planned(place).identity == resolve_model(str(model)).identity
    assert set(names(place)) == {"_MIRROR", *(name for name, *_ in planned(place).files)}, (
        "the other's own files are gone"
    )


def test_a_place_with_other_files_is_not_touched(place: str, model: Path) -> None:
    locate(place).fs.pipe_file(f"{place[5:]}/config.json", b"mine")
    with pytest.raises(ConflictError, match=r"holds files that are of no mirror, e\.g\. 'config\.json'"):
        copied(model, place, replacing=True)
    assert names(place) == ["config.json"]


def test_a_byte_that_changed_in_the_copy_is_found(place: str, model: Path, tmp_path: Path) -> None:
    copied(model, place)
    data = bytearray((model / WEIGHTS).read_bytes())
    data[-20_001] ^= 1
    locate(place).fs.pipe_file(f"{place[5:]}/{WEIGHTS}", bytes(data))
    with pytest.raises(ModelError, match=r"found sha256 \w+, expected \w+ by the place's _MIRROR"):
        on_this_node(planned(place), Model(name=place))
    assert not list(tmp_path.rglob(WEIGHTS))
    assert copied(model, place).size == (model / WEIGHTS).stat().st_size
    assert on_this_node(planned(place), Model(name=place))[1] is not None


def test_a_copy_that_lost_a_file_or_its_record_says_so(place: str, model: Path) -> None:
    copied(model, place)
    fs = locate(place).fs
    fs.rm_file(f"{place[5:]}/vocab.txt" if "vocab.txt" in names(place) else f"{place[5:]}/tokenizer.json")
    with pytest.raises(ModelError, match="1 files are not there with the sizes that _MIRROR says"):
        planned(place)
    fs.pipe_file(f"{place[5:]}/_MIRROR", b'{"identity": 1')
    with pytest.raises(ConflictError, match=r"cannot be read .*, so it may be another one; .*--replace"):
        copied(model, place)
    with pytest.raises(ModelError, match="_MIRROR: damaged"):
        planned(place)
    assert copied(model, place, replacing=True).size > 0
    assert planned(place).identity == resolve_model(str(model)).identity


def test_a_record_that_leads_out_of_the_cache_is_refused(place: str, model: Path, tmp_path: Path) -> None:
    copied(model, place)
    root = locate(place)
    record = json.loads((root / "_MIRROR").read_bytes())
    evil = {"name": "../../evil.json", "size": 2, "sha256": "0" * 64, "version": ""}
    root.fs.call_s3("put_object", Bucket=root.path.split("/")[0], Key="models/one/../../evil.json", Body=b"{}")
    (root / "_MIRROR").write_bytes(json.dumps({**record, "files": [*record["files"], evil]}).encode())
    with pytest.raises(ModelError, match="expected names below the place"):
        planned(place)
    assert not list(tmp_path.rglob("evil.json"))


def test_a_copy_on_a_disk_is_a_checkpoint_directory(model: Path, tmp_path: Path, cli: Cli) -> None:
    code, _, error = cli("fetch", model, tmp_path / "copy")
    assert code == 0, error
    assert resolve_model(str(tmp_path / "copy")).identity == resolve_model(str(model)).identity
    assert copied(model, str(tmp_path / "copy")).size == 0


def test_what_is_no_model_is_not_copied(place: str, model: Path, tmp_path: Path, cli: Cli) -> None:
    def ends(name: str | Path, to: str | Path, said: str) -> int:
        code, _, error = cli("fetch", name, to)
        assert said in error and "Traceback" not in error, error
        return code

    (tmp_path / "empty").mkdir()
    assert ends(tmp_path / "empty", place, "no config.json") == 5
    shutil.copytree(model, tmp_path / "cut")
    (tmp_path / "cut" / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-1])
    assert ends(tmp_path / "cut", place, "cut short") == 5
    assert ends(tmp_path / "none", place, "no such directory") == 5
    assert ends(place, place, "expected a hub id or a checkpoint directory") == 2
    assert ends(model, "s3://no-such-bucket-here/x", "not found") == 6
    assert ends(model, "http://host/x", "expected a local path, s3://") == 6
    assert ends(model, model, "holds files that are of no mirror") == 4
    assert names(place) == []


def test_a_source_that_changes_on_its_way_is_not_finished(
    place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "own")
    put = mirror_module._put

    def grown(location: Any, source: Path, size: int) -> str:
        if source.name == WEIGHTS:
            source.write_bytes(source.read_bytes() + b"x")
        return put(location, source, size)

    monkeypatch.setattr(mirror_module, "_put", grown)
    with pytest.raises(StorageError, match="or the source changed"):
        copied(tmp_path / "own", place)
    assert "_MIRROR" not in names(place)


def test_the_engine_and_the_store_call_the_marks_of_a_copy_the_same() -> None:
    """Neither room imports the other."""
    marks = (mirror_module.MIRROR, mirror_module.UNFINISHED)
    assert marks == (checkpoint_files.MIRROR, checkpoint_files.UNFINISHED)
