"""Who may import what: rooms one way, the engine on a bare GPU machine, the bookkeeping without torch, Ray for few.

Each case runs in a fresh process in which the named packages are as good as not installed.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "batch_rerank"
ENGINE = sorted(f"batch_rerank.engine.{path.stem}" for path in (PACKAGE / "engine").glob("[!_]*.py"))
STORE = sorted(f"batch_rerank.store.{path.stem}" for path in (PACKAGE / "store").glob("[!_]*.py"))
WITHOUT_TORCH = [f"batch_rerank.engine.{name}" for name in ("checkpoint", "encoding", "kinds", "scorer", "templates")]

UNINSTALL = """
import sys
from importlib.machinery import PathFinder

absent = {absent!r}
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(  # of an instance too: dill asks one
    lambda name, *where: None if name.partition(".")[0] in absent else find(name, *where)
)
"""


def python(code: str, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that does not find the absent packages."""
    program = UNINSTALL.format(absent=absent) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


def imports(modules: list[str], absent: tuple[str, ...]) -> str:
    """What goes wrong when modules are imported where packages are absent; empty if nothing."""
    result = python("".join(f"import {module}\n" for module in modules), absent)
    return result.stderr if result.returncode else ""


def test_the_engine_imports_without_ray_pyarrow_and_fsspec() -> None:
    assert {"batch_rerank.engine.models", "batch_rerank.engine.reranker"} < set(ENGINE)
    assert imports(ENGINE, ("ray", "pyarrow", "fsspec")) == ""


def test_encoding_imports_without_torch() -> None:
    assert set(WITHOUT_TORCH) < set(ENGINE)
    assert imports(WITHOUT_TORCH, ("torch", "transformers", "ray", "pyarrow", "fsspec")) == ""


def test_the_store_imports_without_torch_and_ray() -> None:
    assert {"batch_rerank.store.manifest", "batch_rerank.store.lease"} < set(STORE)
    assert imports(STORE, ("torch", "transformers", "ray")) == ""


def test_the_whole_package_but_two_files_imports_without_ray() -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if path.name not in ("run_ray.py", "cluster.py", "__init__.py")]
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in sorted(paths)]
    assert len(modules) > 20
    assert imports(modules, ("ray",)) == ""


@pytest.mark.parametrize("module", ["batch_rerank", "batch_rerank.cli"])
def test_a_bare_import_stays_light(module: str) -> None:
    heavy = "{'torch', 'transformers', 'ray', 'pyarrow', 'fsspec'}"
    result = python(f"import {module}\nprint(sorted({heavy} & set(sys.modules)))")
    assert result.stdout == "[]\n", result.stderr


# ---- the same while they work, which also runs the imports inside functions

SCORE = """
from batch_rerank import Reranker
reranker = Reranker({directory!r}, device="cpu")
assert reranker.rank("red", ["green", "blue red"], top_k=1)[0]["doc_index"] in (0, 1)
print(sorted({{"ray", "pyarrow", "fsspec"}} & set(sys.modules)))
"""

ENCODE = """
from batch_rerank.engine.checkpoint import resolve_model
from batch_rerank.engine.encoded import Group
from batch_rerank.engine.encoding import make_encoder
encoded = make_encoder(resolve_model({directory!r})).encode([Group("red", ["green", "blue red"])])
print(encoded.n_tokens.tolist())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cross-encoder of one tiny layer that knows three words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification

    directory = tmp_path_factory.mktemp("model")
    vocabulary = {
        word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(directory / "tokenizer.json"))
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig(vocab_size=len(vocabulary), num_labels=1, max_position_embeddings=64, **size)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    for weight in model.parameters():  # so large that different texts score differently
        if weight.ndim > 1:
            torch.nn.init.normal_(weight)
    model.save_pretrained(directory)
    return str(directory)


def test_the_engine_scores_without_ray_pyarrow_and_fsspec(checkpoint: str) -> None:
    result = python(SCORE.format(directory=checkpoint), ("ray", "pyarrow", "fsspec"))
    assert result.stdout == "[]\n", result.stderr


def test_a_cpu_task_encodes_without_torch(checkpoint: str) -> None:
    result = python(ENCODE.format(directory=checkpoint), ("torch", "transformers", "ray", "pyarrow", "fsspec"))
    assert result.stdout == "[5, 6]\n", result.stderr  # [CLS] red [SEP] green [SEP], …


# ---- in the source, where an import inside a function that no test calls counts too


def imported(source: str) -> Iterator[str]:
    """Every module that a source imports, at any depth, with the names taken from it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(folder: str, *packages: str) -> set[str]:
    """The files below a folder of the package that import one of the packages or anything in them."""
    found = {str(path.relative_to(PACKAGE)): imported(path.read_text()) for path in (PACKAGE / folder).rglob("*.py")}
    return {
        path for path, names in found.items() if any(f"{name}.".startswith(f"{p}.") for name in names for p in packages)
    }


def test_three_files_import_ray_and_one_ray_data() -> None:
    assert importers(".", "ray") == {"job/run_ray.py", "job/cluster.py", "job/metrics.py"}
    assert importers(".", "ray.data") == {"job/run_ray.py"}


ROOMS = ("engine", "store", "input", "score", "estimate", "publish", "judge", "report", "labels", "job")
TABLE = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")

ALLOWED = {
    "engine": set(),
    "store": set(),
    "input": {"store"},
    "score": {"engine", "input", "store"},
    "publish": {"engine", "input", "store"},
    "judge": {"engine", "input", "store", "publish"},
    "estimate": {"engine", "input", "store", "score"},
    "report": {"input", "store", "publish", "judge"},
    "labels": {"engine", "input", "store", "publish", "judge"},
    "job": {"engine", "input", "store", "score", "estimate", "publish", "judge", "report"},
}
"""Which rooms a room may import."""

OF_MOST = {"errors", "outside", "calls", "schema", "config", "conditions", "sections", "model_settings"}
BESIDE = dict.fromkeys(ROOMS, OF_MOST)
BESIDE |= {"engine": {"errors"}, "store": {"errors", "outside"}, "labels": BESIDE["labels"] | {"label_settings"}}
"""Which files beside the rooms a room may import. The package itself, for its version, is anybody's."""

ABOVE = {
    "cli.py",
    "cli_base.py",
    "cli_labels.py",
    "cli_outputs.py",
    "cli_plan.py",
    "cli_report.py",
    "demo.py",
    "distill.py",
    "ray_data.py",
    "reranker.py",
    "__init__.py",
}
WITHOUT_JOB = {"cli_base.py", "reranker.py"}

OF_THE_JOB_FILE = {
    "__main__.py": {"cli"},
    "config.py": {"engine", "errors", "outside", "schema", "conditions", "label_settings", "model_settings", "sections"}
    | {"job_file"},
    "conditions.py": {"errors", "sections"},
    "errors.py": {"outside"},
    "sections.py": {"outside"},
    "label_settings.py": {"sections"},
    "model_settings.py": {"engine", "errors", "outside", "sections"},
    "job_file.py": {"errors"},
}


def in_table(markdown: str) -> dict[str, set[str]]:
    """The rooms of the page's table, with the rooms that its last column lets each import."""
    lines = [line.strip("| ").split("|") for line in markdown.split("| room |")[1].split("\n\n")[0].splitlines()[2:]]
    return {cells[0].strip(" `"): set(re.findall(r"`(\w+)`", cells[3] if len(cells) > 3 else "")) for cells in lines}


def reached(path: str, source: str) -> set[str]:
    """What a file of the package takes from other rooms, and from the files beside them."""
    names = [name.split(".") for name in imported(source)]
    found = {parts[1] for parts in names if parts[0] == "batch_rerank" and len(parts) > 1}
    return found - {path.split("/")[0], "__version__"}


def off_the_way(path: str, source: str) -> set[str]:
    """What a file imports and must not."""
    room = path.split("/")[0]
    if room in ROOMS:
        return reached(path, source) - ALLOWED[room] - BESIDE[room]
    if path in ABOVE:
        return {"job"} & reached(path, source) if path in WITHOUT_JOB else set()
    return reached(path, source) - OF_THE_JOB_FILE.get(path, set())


def test_the_pages_table_is_what_is_allowed() -> None:
    assert in_table(TABLE) == ALLOWED


def test_imports_between_rooms_go_one_way() -> None:
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {path.split("/")[0] for path in files if "/" in path} == set(ROOMS)
    assert {path: found for path, source in files.items() if (found := off_the_way(path, source))} == {}


def test_the_page_says_who_imports_the_job() -> None:
    assert {path for path in importers(".", "batch_rerank.job") if "/" not in path} == ABOVE - WITHOUT_JOB


def test_the_engine_and_the_store_name_no_heavy_packages_of_others() -> None:
    assert importers("engine", "ray", "pyarrow", "fsspec") == set()
    assert importers("store", "ray", "torch", "transformers") == set()


def test_files_that_the_page_names_exist() -> None:
    named = set(re.findall(r"`((?!tests/)[\w/]+\.py)`", TABLE))
    assert len(named) > 30
    assert [name for name in sorted(named) if not (PACKAGE / name).exists()] == []


# ---- these checks can fail


def test_an_absent_package_is_absent() -> None:
    assert "No module named 'pyarrow'" in imports(["batch_rerank.input.shards"], ("pyarrow",))
    assert "No module named 'torch'" in imports(["batch_rerank.engine.models"], ("torch",))
    assert "No module named 'ray'" in imports(["batch_rerank.job.run_ray"], ("ray",))


def test_an_import_inside_a_function_is_seen() -> None:
    source = "import os\ndef f():\n    from ray.data import Dataset\n    import rayon, torch.nn as nn\n"
    assert list(imported(source)) == ["os", "ray.data.Dataset", "rayon", "torch.nn"]
    assert "job/metrics.py" in importers("job", "ray.util.metrics"), "inside a function"
    assert importers(".", "ra") == set()


@pytest.mark.parametrize(
    ("path", "line", "named"),
    [
        ("publish/rank.py", "from batch_rerank.score.plan import make_plan", {"score"}),
        ("score/plan.py", "from batch_rerank.publish import rank", {"publish"}),
        ("store/scan.py", "from batch_rerank.engine.checkpoint import ModelSpec", {"engine"}),
        ("store/scan.py", "def f():\n    import batch_rerank.config", {"config"}),
        ("engine/kinds.py", "from batch_rerank import store", {"store"}),
        ("input/units.py", "from batch_rerank.engine.encoded import Group", {"engine"}),
        ("input/units.py", "from batch_rerank.job.run import run", {"job"}),
        ("judge/evaluate.py", "from batch_rerank.job.run import run", {"job"}),
        ("config.py", "from batch_rerank.input.layouts import Columns", {"input"}),
        ("schema.py", "from batch_rerank.config import JobConfig", {"config"}),
        ("job/run.py", "from batch_rerank.cli import app", {"cli"}),
        ("score/plan.py", "import batch_rerank\nfrom batch_rerank import __version__", set()),
    ],
)
def test_an_import_the_wrong_way_is_named(path: str, line: str, named: set[str]) -> None:
    assert off_the_way(path, line) == named


def test_a_table_with_another_cell_is_another_one() -> None:
    assert in_table(TABLE.replace("| `engine`, `input`, `store` |", "| `engine`, `store` |", 1)) != ALLOWED
