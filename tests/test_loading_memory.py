"""Loading needs no second copy of a model in host memory. Each case is a fresh process, whose anonymous memory is
watched: pages of mapped files do not count, which the kernel can drop.

There is no device here that takes weights off the host, so "meta" stands for one: what stays on the host while a model
goes there is seen, how a driver copies is not.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MIB = 2**20
LOAD = """
import json, sys, threading, time, types
from pathlib import Path
from transformers import AutoModelForCausalLM
from batch_rerank.engine import loading

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], anonymous())

directory, how, device = sys.argv[1:]
spec = types.SimpleNamespace(directory=directory, dtype="float32", trust_remote_code=False, pickled=False, name="model")
raw = json.loads((Path(directory) / "config.json").read_text())
idle = anonymous()
peak, done = [idle], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
if how == "straight":
    model, info = loading.from_pretrained(AutoModelForCausalLM, spec, raw, device)
else:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").to(device)
done.set()
watcher.join()
size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
devices = sorted({tensor.device.type for tensor in [*model.parameters(), *model.buffers()]})
print(json.dumps({"peak": peak[0] - idle, "size": size, "devices": devices}))
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """123 M weights in bfloat16: 8 shards of up to 32 MiB, whose largest tensor has 16 MiB, 32 in float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("sharded")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 7}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    config = Qwen3Config(vocab_size=8192, tie_word_embeddings=False, **sizes, **heads)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="32MB")
    assert len(list(directory.glob("*.safetensors"))) >= 8
    return directory


def loaded(directory: Path, how: str, device: str) -> dict[str, Any]:
    command = [sys.executable, "-c", LOAD, str(directory), how, device]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_on_the_way_to_a_device_the_host_holds_less_than_a_shard(sharded: Path) -> None:
    found = loaded(sharded, "straight", "meta")
    assert found["devices"] == ["meta"]
    assert found["peak"] < 32 * MIB


def test_in_host_memory_a_model_is_once(sharded: Path) -> None:
    found = loaded(sharded, "straight", "cpu")
    assert found["devices"] == ["cpu"]
    assert 0.9 * found["size"] < found["peak"] < found["size"] + 32 * MIB


def test_the_watch_sees_a_model_that_goes_through_host_memory(sharded: Path) -> None:
    found = loaded(sharded, "through the host", "meta")
    assert found["peak"] > 0.9 * found["size"]
