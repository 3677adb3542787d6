"""A wrong checkpoint or setting is refused before anything is scored, with a message that names what is wrong."""

import itertools
import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import bert_embedding, bert_reranker, qwen3_embedding, qwen3_reranker, rewrite, xlmr_reranker
from safetensors.torch import load_file, save_file

from batch_rerank.engine.checkpoint import ModelSpec, relocate, resolve_model
from batch_rerank.engine.checkpoint_files import identify, safetensors_header, samples
from batch_rerank.engine.encoded import Group
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.loading import load as load_network
from batch_rerank.engine.reranker import Reranker
from batch_rerank.engine.scorer import make_scorer
from batch_rerank.errors import BatchRerankError, ConfigError, ModelError

Copy = Callable[[str], Path]
BUILDERS = {
    "qwen": qwen3_reranker,
    "qwen-untied": lambda path: qwen3_reranker(path, tied=False),
    "qwen-embedding": qwen3_embedding,
    "xlmr": xlmr_reranker,
    "bert": bert_reranker,
    "minilm": bert_embedding,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build(tmp_path_factory.mktemp("originals") / name) for name, build in BUILDERS.items()}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Copy:
    """A copy of a good checkpoint, to damage."""
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))


def load(directory: str | Path, **settings: Any) -> ModelSpec:
    """All that a job does with a model before the first pair."""
    spec = resolve_model(str(directory), **settings)
    make_encoder(spec)
    make_scorer(spec)
    return spec


def refused(error: type[BatchRerankError], directory: str | Path, *parts: str, **settings: Any) -> None:
    """Loading raises exactly this error, and its message has all the parts."""
    with pytest.raises(error) as caught:
        load(directory, **settings)
    assert (type(caught.value), error.exit_code) in [(ConfigError, 2), (ModelError, 5)]
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_good_checkpoint_is_described_by_its_own_files(originals: dict[str, Path]) -> None:
    found = {name: load(originals[name]) for name in BUILDERS}
    assert {name: (spec.kind, spec.max_length, spec.relevance) for name, spec in found.items()} == {
        "qwen": ("causal", 8192, "sigmoid"),
        "qwen-untied": ("causal", 8192, "sigmoid"),
        "qwen-embedding": ("bi_encoder", 40960, "none"),
        "xlmr": ("sequence_classification", 1024, "sigmoid"),
        "bert": ("sequence_classification", 512, "none"),
        "minilm": ("bi_encoder", 256, "none"),
    }


def test_no_weights(copy: Copy) -> None:
    directory = copy("xlmr")
    (directory / "model.safetensors").unlink()
    refused(ModelError, directory, str(directory), "no weights", "expected *.safetensors")


def test_pickled_weights_are_named_and_never_opened(copy: Copy) -> None:
    directory = copy("xlmr")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(ModelError, directory, "only pickled weights (pytorch_model.bin)", "allow_pickle")


def test_pickled_weights_are_read_where_they_are_allowed_and_run_no_code(copy: Copy, tmp_path: Path) -> None:
    directory = copy("xlmr")
    expected = Reranker(str(directory), device="cpu").score([("query", "document")])
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    spec = resolve_model(str(directory), allow_pickle=True)
    encoded = make_encoder(spec).encode([Group("query", ["document"])])
    np.testing.assert_array_equal(make_scorer(spec).score(encoded), expected)

    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"weight": Touch()}, directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        make_scorer(resolve_model(str(directory), allow_pickle=True))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.9999])
def test_a_safetensors_file_cut_short(copy: Copy, kept: float) -> None:
    directory = copy("xlmr")
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept * len(content))])
    refused(ModelError, directory, str(weights), f"found {int(kept * len(content)):,} bytes", "copy it again")


def test_an_index_that_names_an_absent_file(copy: Copy) -> None:
    directory = copy("xlmr")
    shards = {"a.weight": "model.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    refused(ModelError, directory, "model.safetensors.index.json", "['model-00002-of-00002.safetensors']", "not there")


def test_a_missing_weight_key_is_refused_and_named(copy: Copy) -> None:
    directory = copy("xlmr")
    edit_weights(directory, lambda weights: weights.pop("classifier.out_proj.weight"))
    refused(ModelError, directory, "1 missing keys: classifier.out_proj.weight", "every weight")


def test_a_missing_untied_head_is_refused_and_named(copy: Copy) -> None:
    directory = copy("qwen-untied")
    edit_weights(directory, lambda weights: weights.pop("lm_head.weight"))
    refused(ModelError, directory, "1 missing keys: lm_head.weight")


def test_an_unexpected_weight_key_is_refused_and_named(copy: Copy) -> None:
    directory = copy("xlmr")
    edit_weights(directory, lambda weights: weights.update({"adapter.weight": torch.ones(2)}))
    refused(ModelError, directory, "1 unexpected keys: adapter.weight")


def test_a_weight_of_another_shape_is_refused_and_named(copy: Copy) -> None:
    directory = copy("xlmr")
    edit_weights(directory, lambda weights: weights.update({"classifier.dense.weight": torch.ones(48, 24)}))
    refused(ModelError, directory, "1 mismatched keys", "classifier.dense.weight")


@pytest.mark.parametrize("name", ["qwen", "xlmr", "minilm"])
def test_weights_that_give_nan_are_refused_at_the_first_score(copy: Copy, name: str) -> None:
    directory = copy(name)
    edit_weights(
        directory,
        lambda weights: [tensor.fill_(float("nan")) for tensor in weights.values() if tensor.is_floating_point()],
    )
    spec = resolve_model(str(directory))
    encoded = make_encoder(spec).encode([Group("query", ["one", "two"])])
    with pytest.raises(ModelError, match=r"NaN or infinity for (2 of 2 pairs|3 of 3 texts)"):
        make_scorer(spec).score(encoded)


def test_no_tokenizer(copy: Copy) -> None:
    directory = copy("xlmr")
    (directory / "tokenizer.json").unlink()
    refused(ModelError, directory, str(directory), "no tokenizer.json")


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[]"])
def test_a_damaged_tokenizer(copy: Copy, content: str) -> None:
    directory = copy("xlmr")
    (directory / "tokenizer.json").write_text(content)
    refused(ModelError, directory, f"{directory}/tokenizer.json: not a tokenizer", "copy it again")


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_an_answer_that_is_not_one_token(copy: Copy, answer: str) -> None:
    directory = copy("qwen")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    merges = [merge for merge in tokenizer["model"]["merges"] if "".join(merge) != answer]
    rewrite(directory / "tokenizer.json", model={**tokenizer["model"], "merges": merges})
    refused(ModelError, directory, "'qwen3-reranker'", f"the answer '{answer}' is 2 tokens", "expected one")


def test_no_config_json(copy: Copy) -> None:
    directory = copy("qwen")
    (directory / "config.json").unlink()
    refused(ModelError, directory, str(directory), "no config.json", "expected a transformers checkpoint")


@pytest.mark.parametrize("content", [b"", b"architectures: [X]", b"\xff\xfe\x00"])
def test_a_config_that_is_not_json(copy: Copy, content: bytes) -> None:
    directory = copy("qwen")
    (directory / "config.json").write_bytes(content)
    refused(ModelError, directory, f"{directory}/config.json: not JSON", "copy it again")


@pytest.mark.parametrize("architectures", [["JinaForRanking"], ["BertForMaskedLM"], [], None])
def test_a_listwise_or_unknown_architecture(copy: Copy, architectures: list[str] | None) -> None:
    directory = copy("xlmr")
    rewrite(directory / "config.json", architectures=architectures)
    refused(ModelError, directory, str(architectures or "unnamed"), "Listwise models", "do not fit")


def test_a_classification_head_with_three_labels(copy: Copy) -> None:
    directory = copy("xlmr")
    rewrite(directory / "config.json", id2label={"0": "contradiction", "1": "entailment", "2": "neutral"})
    refused(ModelError, directory, "3 labels", "expected 1")


def test_an_embedding_checkpoint_is_not_a_causal_one_whatever_its_config_says(copy: Copy) -> None:
    directory = copy("qwen-embedding")
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    refused(ModelError, directory, "model.kind is 'causal'", "files say 'bi_encoder'", kind="causal")


def test_a_pooling_this_program_has_not(copy: Copy) -> None:
    directory = copy("minilm")
    pooling = {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
    rewrite(directory / "1_Pooling" / "config.json", **pooling)
    refused(ModelError, directory, "1_Pooling/config.json", "['max_tokens']", "'lasttoken'")


def test_a_sentence_model_with_a_dense_layer(copy: Copy) -> None:
    directory = copy("minilm")
    modules = json.loads((directory / "modules.json").read_text())
    modules.insert(2, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (directory / "modules.json").write_text(json.dumps(modules))
    refused(ModelError, directory, "modules.json", "['Transformer', 'Pooling', 'Dense', 'Normalize']")


@pytest.mark.parametrize("name", ["/no/such/directory", "./nowhere", "nowhere", "a/b/c"])
def test_a_directory_that_does_not_exist(name: str) -> None:
    refused(ModelError, name, repr(name), "no such directory on this machine", "on every node")


def test_a_hub_id_that_is_neither_cached_nor_reachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused(ModelError, "owner/no-such-model", "'owner/no-such-model'", "could not be fetched", "HF_TOKEN")


@pytest.fixture
def with_code(copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose own code leaves a mark where it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = copy("xlmr")
    (directory / "modeling.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForSequenceClassification": "modeling.Model"}
    rewrite(directory / "config.json", model_type="of_its_own", auto_map=auto_map)
    return directory


def test_code_in_a_checkpoint_is_refused_and_does_not_run(with_code: Path, tmp_path: Path) -> None:
    refused(ModelError, with_code, "names code of its own", "modeling.Config", "model.trust_remote_code: true")
    assert not (tmp_path / "ran").exists()


def test_code_in_a_checkpoint_runs_only_where_it_is_trusted(with_code: Path, tmp_path: Path) -> None:
    # all it does is the mark
    refused(ModelError, with_code, "cannot be loaded", "Config", trust_remote_code=True, template="pair")
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "longest"), [("xlmr", 1024), ("bert", 512), ("qwen", 40960)])
def test_max_length_is_within_the_models_positions(originals: dict[str, Path], name: str, longest: int) -> None:
    assert resolve_model(str(originals[name]), max_length=longest).max_length == longest
    for wrong in (longest + 1, 31, 0, -1):
        refused(ConfigError, originals[name], f"found {wrong}", f"expected 32 to {longest}", max_length=wrong)


def test_max_length_must_hold_the_template_and_the_least_that_does_is_named(originals: dict[str, Path]) -> None:
    refused(ConfigError, originals["qwen"], "found 80", "template 'qwen3-reranker' takes 80", max_length=80)
    load(originals["qwen"], max_length=81)


def test_an_instruction_where_the_template_has_no_place(originals: dict[str, Path]) -> None:
    for name, template in (("xlmr", "pair"), ("minilm", "sentence")):
        refused(ConfigError, originals[name], "'be brief'", f"'{template}' has no place", instruction="be brief")


def test_an_unknown_template(originals: dict[str, Path]) -> None:
    refused(ConfigError, originals["qwen"], "found 'chatml'", "'qwen3-reranker'", template="chatml")
    refused(ConfigError, originals["xlmr"], "found 'chatml'", "takes 'pair' or auto", template="chatml")


def test_a_checkpoint_keeps_its_identity_in_another_place(originals: dict[str, Path], copy: Copy) -> None:
    assert identify(copy("minilm"), None) == identify(originals["minilm"], None)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config.json", b"48", b"49"),
        ("1_Pooling/config.json", b"true", b"True"),
        ("tokenizer.json", b"the", b"teh"),
        ("model.safetensors", b"pooler.dense.bias", b"pooler.dense.bia5"),
    ],
)
def test_a_change_of_a_small_file_or_of_a_weights_header_is_another_identity(
    originals: dict[str, Path], copy: Copy, file: str, old: bytes, new: bytes
) -> None:
    directory = copy("minilm")
    content = (directory / file).read_bytes()
    (directory / file).write_bytes(content.replace(old, new, 1))
    assert len(content) == (directory / file).stat().st_size
    assert identify(directory, None) != identify(originals["minilm"], None)


def replaced(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> bool:
    """Whether weights edited in place, with the same header and size, are another identity."""
    weights = directory / "model.safetensors"
    before, size, header = identify(directory, None), weights.stat().st_size, safetensors_header(weights)
    edit_weights(directory, change)
    assert (weights.stat().st_size, safetensors_header(weights)) == (size, header)
    return identify(directory, None) != before


@pytest.mark.parametrize("name", ["qwen", "xlmr"])
def test_other_values_of_any_one_tensor_are_another_identity(copy: Copy, name: str) -> None:
    directory = copy(name)
    for tensor in load_file(directory / "model.safetensors"):
        assert replaced(directory, lambda weights, at=tensor: weights[at].mul_(1.01)), tensor  # type: ignore[misc]
    assert not replaced(directory, lambda weights: None)


def test_a_third_of_a_tensor_is_always_sampled_and_a_small_tensor_whole() -> None:
    for size in (0, 1, 4096):
        assert samples("a", size) == [(0, size)]
    for name in map(str, range(50)):
        for size in (4097, 10_000, 1_000_003, 3 * 2**30):
            found = samples(name, size)
            assert found == samples(name, size) == sorted(found)
            assert all(offset >= 0 and offset + length <= size for offset, length in found)
            ends = [0, *(offset for offset, _ in found), size]
            assert max(b - a for a, b in itertools.pairwise(ends)) <= size / 3 + 2 * 512
            assert sum(length for _, length in found) == 4096


def test_a_checkpoint_of_16_gb_is_identified_by_what_little_is_read(tmp_path: Path) -> None:
    at, entries = 0, {}
    for layer in range(400):
        entries[f"layers.{layer}"] = {"dtype": "BF16", "shape": [20 * 2**20], "data_offsets": [at, at + 40 * 2**20]}
        at += 40 * 2**20
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + at)  # holes: they read as zeros and take no room
    started, before = time.monotonic(), identify(tmp_path, None)
    assert time.monotonic() - started < 10  # took 0.04 s
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert identify(tmp_path, None) != before


def test_pickles_beside_safetensors_are_not_loaded_and_do_not_count(copy: Copy) -> None:
    directory = copy("xlmr")
    before = identify(directory, None)
    (directory / "pytorch_model.bin").write_bytes(b"old")
    assert identify(directory, None) == before
    (directory / "model.safetensors").unlink()
    pickled = identify(directory, None)
    (directory / "pytorch_model.bin").write_bytes(b"new")
    assert len({before, pickled, identify(directory, None)}) == 3


def test_a_node_with_another_checkpoint_than_the_planned_one_is_refused(copy: Copy) -> None:
    directory = copy("xlmr")
    spec = resolve_model(str(directory))
    assert relocate(spec) == spec
    rewrite(directory / "config.json", layer_norm_eps=1e-3)
    with pytest.raises(ModelError, match="but the plan has sha256:"):
        relocate(spec)


@pytest.mark.parametrize(("name", "part"), [("xlmr", "classifier.out_proj"), ("bert", "classifier"), ("qwen", "model")])
def test_a_zeroed_head_is_refused(copy: Copy, name: str, part: str) -> None:
    directory = copy(name)
    edit_weights(directory, lambda weights: [value.zero_() for key, value in weights.items() if key.startswith(part)])
    refused(ModelError, directory, "every weight of its scoring head is 0")


def test_a_tokenizer_with_ids_beyond_the_embedding(copy: Copy) -> None:
    directory = copy("bert")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["beyond"] = 5000
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(ModelError, directory, "gives ids up to 5000", "expected the tokenizer of this model")


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("minilm", "modules.json", '{"a": 1}'),
        ("minilm", "modules.json", '["a"]'),
        ("minilm", "config_sentence_transformers.json", '{"prompts": ["a"]}'),
        ("bert", "tokenizer_config.json", '{"model_max_length": "long"}'),
        ("bert", "model.safetensors.index.json", '{"weight_map": [1]}'),
    ],
)
def test_a_side_file_of_an_unexpected_form(copy: Copy, name: str, file: str, content: str) -> None:
    directory = copy(name)
    (directory / file).write_text(content)
    refused(ModelError, directory, str(directory))


def test_a_last_token_model_whose_tokenizer_appends_no_end(copy: Copy) -> None:
    directory = copy("qwen-embedding")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(ModelError, directory, "appends no end token")


def test_settings_that_are_none_of_the_choices(originals: dict[str, Path]) -> None:
    refused(ConfigError, originals["qwen"], "model.dtype: found 'int8'", dtype="int8")
    refused(ConfigError, originals["qwen"], "model.kind: found 'magic'", kind="magic")


def test_a_template_may_be_chosen_for_another_architecture(copy: Copy) -> None:
    directory = copy("qwen")
    rewrite(directory / "config.json", model_type="qwen2")
    with pytest.raises(ConfigError, match="no template is known for the architecture"):
        resolve_model(str(directory))
    assert resolve_model(str(directory), template="qwen3-reranker").template == "qwen3-reranker"


def test_where_transformers_wants_accelerate_all_the_same_weights_go_through_the_host(
    originals: dict[str, Path], logged: list[str]
) -> None:
    from transformers import AutoModel

    class Strict:
        @staticmethod
        def from_pretrained(directory: str, device_map: Any = None, **settings: Any) -> Any:
            if device_map is not None:
                raise ValueError("Using a `device_map` requires `accelerate`")
            return AutoModel.from_pretrained(directory, **settings)

    spec = resolve_model(str(originals["minilm"]))
    network = load_network(Strict, spec, "cpu")
    for name, tensor in load_network(AutoModel, spec, "cpu").state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])
    assert ["through a whole copy in host memory" in message for message in logged] == [True]


@pytest.mark.parametrize(
    "changes",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"attention_multiplier": 0.5},
        {"logit_scale": 0.0625},
        {"use_logn_attn": True},
        {"alibi": True},
    ],
)
def test_what_a_config_says_and_transformers_leaves_out_is_refused(copy: Copy, changes: dict[str, Any]) -> None:
    directory = copy("qwen")
    rewrite(directory / "config.json", **changes)
    refused(ModelError, directory, "config.json says", "Qwen3ForCausalLM takes no notice")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 0.1},
        {"rope_theta": 9},
    ],
)
def test_what_a_config_says_in_an_old_or_new_key_is_computed(copy: Copy, changes: dict[str, Any]) -> None:
    directory = copy("qwen")
    before = Reranker(str(directory), device="cpu").score([("query", "document")])
    rewrite(directory / "config.json", **changes)
    after = Reranker(str(directory), device="cpu").score([("query", "document")])
    assert abs(after - before).max() > 0.01


@pytest.mark.parametrize("changes", [{"rope_scaling": {"type": "ntk", "factor": 2.0}}, {"attention_bias": True}])
def test_what_the_weights_or_transformers_do_not_have_is_refused(copy: Copy, changes: dict[str, Any]) -> None:
    directory = copy("qwen")
    rewrite(directory / "config.json", **changes)
    refused(ModelError, directory)


def test_quantized_weights_and_capped_attention_are_refused(copy: Copy) -> None:
    directory = copy("qwen")
    rewrite(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(ModelError, directory, "quantization_config (gptq)", "made from")
    rewrite(directory / "config.json", quantization_config=None, attn_logit_softcapping=50.0)
    refused(ModelError, directory, "attn_logit_softcapping 50.0")


def test_an_adapter_is_not_a_model(copy: Copy) -> None:
    directory = copy("qwen")
    (directory / "adapter_config.json").write_text("{}")
    refused(ModelError, directory, "adapter_config.json", "merge")


def test_weights_beyond_float16_are_refused_in_float16(copy: Copy) -> None:
    directory = copy("xlmr")
    load(directory, dtype="float16")
    edit_weights(directory, lambda weights: weights["classifier.dense.weight"][3, 5].fill_(1e5))
    load(directory, dtype="bfloat16")
    refused(ModelError, directory, "classifier.dense.weight", "bfloat16 or float32", dtype="float16")
