"""What cannot be published otherwise withdraws nothing: every file of the output is as it was."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import bert_reranker
from conftest import Row, candidate_rows, job, rows_of, scored_only, write
from test_labels_held import plainly

import batch_rerank.job.finish as finish
import batch_rerank.publish.score_files as score_files
from batch_rerank.errors import ConfigError, InputError, StorageError
from batch_rerank.job.again import score_movers
from batch_rerank.job.republish import republish
from batch_rerank.job.run import run
from batch_rerank.publish.output import Place
from batch_rerank.publish.score_files import ScoreFiles
from batch_rerank.publish.verify import verify

Cli = Callable[..., tuple[int, str, str]]
Break = Callable[[Path], None]
ROWS = [row for query in range(4) for row in candidate_rows(1, 5, query)]


def published(output: Path) -> dict[str, bytes]:
    """What readers see, and what leads to it."""
    names = [
        *output.glob("*.parquet"),
        output / "_SUCCESS",
        output / "_run.trec",
        output / "_manifest/publication.json",
    ]
    return {path.name: path.read_bytes() for path in names if path.exists()}


def other_letter(column: str) -> Break:
    """Another value of as many bytes in one row: the shard's size and footer stay."""

    def change(shards: Path) -> None:
        rows: list[Row] = [dict(row) for row in ROWS]
        for row in rows:
            if row["query_id"] == "q3":
                row[column] = "T" + str(row[column])[1:]
        plainly(shards / "0.parquet", rows)

    return change


def flipped(output: Path) -> None:
    scores = output / "_scores/00000.parquet"
    data = bytearray(scores.read_bytes())
    data[len(data) // 3] ^= 1
    scores.write_bytes(bytes(data))


REFUSED = {
    "a column that is not there": ({"passthrough": ["lang", "nope"]}, None, InputError, "'nope', which is not there"),
    "other ids": ({"include_text": True}, other_letter("doc_id"), InputError, "other rows than were scored"),
    "other texts": ({"include_text": True}, other_letter("text"), InputError, "the document's text is not the one"),
    "another query": ({"passthrough": ["lang"]}, other_letter("query"), InputError, "the query is not the one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_input_does_not_have(case: str, tmp_path: Path) -> None:
    keys, broken, kind, told = REFUSED[case]
    plainly(tmp_path / "in/0.parquet", ROWS)
    run(job(tmp_path / "in", tmp_path / "out", output__trec_run=True), local=True)
    before = published(tmp_path / "out")
    if broken:
        broken(tmp_path / "in")
    again = job(tmp_path / "in", tmp_path / "out", **{f"output__{name}": value for name, value in keys.items()})
    with pytest.raises(kind, match=told):
        republish(Place(again.output.path, {}, again), local=True)
    assert published(tmp_path / "out") == before and len(before) == 4
    plainly(tmp_path / "in/0.parquet", ROWS)
    assert verify(str(tmp_path / "out")).problems == []


def test_scores_that_are_damaged(tmp_path: Path) -> None:
    """The parts are the only good copy then, and `verify --repair` makes the scores again."""
    plainly(tmp_path / "in/0.parquet", ROWS)
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    before = published(tmp_path / "out")
    flipped(tmp_path / "out")
    again = job(tmp_path / "in", tmp_path / "out", output__top_k=2)
    with pytest.raises(StorageError, match="another checksum"):
        republish(Place(again.output.path, {}, again), local=True)
    assert published(tmp_path / "out") == before


@pytest.mark.usefixtures("local_ray")
@pytest.mark.slow
def test_on_ray_parts_are_tried_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a task, where the scores are many."""
    monkeypatch.setattr(finish, "SMALL_BYTES", 1)
    plainly(tmp_path / "in/0.parquet", ROWS)
    keys = {"input__unit_pairs": 5, "output__file_bytes": 1}
    run(job(tmp_path / "in", tmp_path / "out", **keys), local=True)
    again = job(tmp_path / "in", tmp_path / "out", output__top_k=2, output__passthrough=["lang"], **keys)
    assert republish(Place(again.output.path, {}, again)).rows_out == 8
    assert verify(str(tmp_path / "out")).problems == []
    before = published(tmp_path / "out")
    flipped(tmp_path / "out")
    again = job(tmp_path / "in", tmp_path / "out", output__top_k=3, **keys)
    with pytest.raises(StorageError, match="verify --repair"):
        republish(Place(again.output.path, {}, again))
    assert published(tmp_path / "out") == before


@pytest.mark.parametrize("top_k", [None, 2])
def test_ids_that_are_no_fields_of_a_trec_run(top_k: int | None, tmp_path: Path) -> None:
    """Where nothing else differs, and where parts would be made again."""
    write(tmp_path / "in/0.parquet", [{**row, "doc_id": row["doc_id"].replace("d0", "d 0")} for row in ROWS])
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    before = published(tmp_path / "out")
    again = job(tmp_path / "in", tmp_path / "out", output__trec_run=True, output__top_k=top_k)
    with pytest.raises(InputError, match="'d 0' is empty or has white space"):
        republish(Place(again.output.path, {}, again), local=True)
    assert published(tmp_path / "out") == before
    assert run(job(tmp_path / "in", tmp_path / "out"), local=True).units == 0


def test_columns_of_other_types_in_each_shard(tmp_path: Path) -> None:
    """A job that scores is told before it begins; one that is published otherwise, before it withdraws."""
    write(tmp_path / "in/0.parquet", [{**row, "year": 2000} for row in ROWS[:10]])
    write(tmp_path / "in/1.parquet", [{**row, "year": "2000"} for row in ROWS[10:]])
    run(job(tmp_path / "in", tmp_path / "out"), local=True)
    before = published(tmp_path / "out")
    again = job(tmp_path / "in", tmp_path / "out", output__passthrough=["year"])
    with pytest.raises(InputError, match="expected one type in all shards"):
        republish(Place(again.output.path, {}, again), local=True)
    assert published(tmp_path / "out") == before


def test_ids_of_movers_are_no_pictures(tmp_path: Path, cli: Cli) -> None:
    """rich writes :bug: as a picture, and [b] as nothing."""
    model = bert_reranker(tmp_path / "model")
    rows = [{**row, "doc_id": f":bug:[b]{row['doc_id']}"} for row in ROWS]
    write(tmp_path / "in/0.parquet", rows)
    keys = {"model__name": str(model), "model__kind": "auto", "model__max_length": 128}
    run(job(tmp_path / "in", tmp_path / "out", **keys), local=True)
    code, out, _ = cli("report", tmp_path / "out", "--score-movers")
    assert code == 0 and ":bug:[b]d" in out


def test_movers_of_other_texts_are_not_scored_again(tmp_path: Path) -> None:
    model = bert_reranker(tmp_path / "model")
    plainly(tmp_path / "in/0.parquet", ROWS)
    keys = {"model__name": str(model), "model__kind": "auto", "model__max_length": 128}
    run(job(tmp_path / "in", tmp_path / "out", **keys), local=True)
    assert score_movers(Place(str(tmp_path / "out")))
    assert len(rows_of(tmp_path / "out")) == len(ROWS)
    other_letter("text")(tmp_path / "in")
    with pytest.raises(InputError, match="the document's text is not the one that was scored"):
        score_movers(Place(str(tmp_path / "out")))


def test_a_pointer_among_the_sources_of_a_stage_is_refused(tmp_path: Path) -> None:
    """The plan's input is the stage; what the job reads is its sources."""
    rows = candidate_rows(4, 6)
    for number in range(2):  # each query has rows in both
        write(tmp_path / "raw" / f"{number}.parquet", rows[number::2])
    staged = job(str(tmp_path / "raw/*"), tmp_path / "out")
    run(staged, local=True)
    before = published(tmp_path / "out")
    again = job(str(tmp_path / "raw/*"), tmp_path / "out", output__latest=str(tmp_path / "raw/latest"), output__top_k=2)
    with pytest.raises(ConfigError, match=r"takes in output\.latest"):
        republish(Place(again.output.path, {}, again), local=True)
    assert published(tmp_path / "out") == before and not (tmp_path / "raw/latest").exists()


@pytest.mark.parametrize("keep", ["work", "scores"])
def test_a_map_is_one_type_whatever_its_column_is_called(keep: str, tmp_path: Path) -> None:
    """pyarrow writes a map's type with the name of its column, which is another one in score files."""
    table = pa.Table.from_pylist(candidate_rows(4, 10))
    table = table.append_column("x", pa.array([[("a", 1)]] * 40, pa.map_(pa.string(), pa.int32())))
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/0.parquet")
    keys = {"input__unit_pairs": 10}
    out = scored_only(job(tmp_path / "in", tmp_path / "out", **keys))
    (out / "_work/00000-00001.parquet").unlink()
    with_map = job(tmp_path / "in", out, output__passthrough=["x"], **keys)
    if keep == "scores":
        run(with_map, local=True)
        with_map = job(tmp_path / "in", out, output__passthrough=["x"], output__top_k=2, **keys)
        republish(Place(str(out), {}, with_map), local=True)
    else:
        run(with_map, local=True)
    assert all(value == [("a", 1)] for value in rows_of(out)["x"].to_pylist())
    assert verify(str(out)).problems == []


def test_columns_from_the_input_cost_the_same_however_many_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is opened once, and each of its row groups is looked at once for where its hashes begin."""
    counted: list[str] = []
    kept, firsts = ScoreFiles._kept, score_files._firsts
    monkeypatch.setattr(ScoreFiles, "_kept", lambda self, name: counted.append(name) or kept(self, name))
    monkeypatch.setattr(score_files, "_firsts", lambda file: counted.append("firsts") or firsts(file))
    write(tmp_path / "in/0.parquet", candidate_rows(30, 2))
    keys = {"input__unit_pairs": 4}
    run(job(tmp_path / "in", tmp_path / "out", **keys), local=True)
    again = job(tmp_path / "in", tmp_path / "out", output__passthrough=["lang"], **keys)
    republish(Place(again.output.path, {}, again), local=True)
    assert counted == ["_scores/00000.parquet", "firsts"] * 2, "tried, then made"
    assert set(rows_of(tmp_path / "out")["lang"].to_pylist()) == {"alpha", "beta"}
