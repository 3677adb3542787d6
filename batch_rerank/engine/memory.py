"""How many tokens are computed at once: chosen from free memory, halved where that was too much, and remembered."""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from batch_rerank.engine.packing import Float32, Index

log = logging.getLogger("batch_rerank")

CPU_TOKENS = 4096
"""On CPUs packs of 2,000 to 4,000 tokens were faster than 8,000: their activations stay in the caches."""

CUDA_TOKENS = 65536
"""On GPUs more tokens than this make no matrix product faster."""

SMALLEST = 512


Fetch = Callable[[], tuple[Index, Float32]]
"""Waits for results that are on their way: int64[n] items, and float32[n, ...] results."""


class TokenBudget:
    """Tokens of one batch. `tokens` goes down when memory runs out, never up."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def start(
        self,
        items: Index,
        split: Callable[[Index, int], Iterator[Index]],
        compute: Callable[[Index], torch.Tensor],
    ) -> Fetch:
        """Compute items batch by batch, without waiting for the device. The call that is returned waits, and gives the
        items that were computed, in the order they were, and their results.

        `split` makes batches of items under a token budget, `compute` gives a batch's results on the device, one row
        an item. An item that memory is too small for even alone is left out.
        """
        done: list[Index] = []
        results: list[torch.Tensor] = []
        pending = items
        while len(pending):
            for batch in split(pending, self.tokens):
                try:
                    with torch.inference_mode():
                        results.append(compute(batch))
                except (RuntimeError, MemoryError) as error:
                    if not _out_of_memory(error):
                        raise
                    pending = self._retreat(pending, done, batch)
                    break
                done.append(batch)
            else:
                break
        if not results:
            return lambda: (np.empty(0, np.int64), np.empty(0, np.float32))
        wait = _to_host(torch.cat(results))
        return lambda: (np.concatenate(done), wait())

    def _retreat(self, pending: Index, done: list[Index], batch: Index) -> Index:
        """What is still to compute after memory ran out in a batch."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            log.warning("memory ran out on a single text or pair: it is left without a score")
            done_now = [*done, batch]
        else:
            self.tokens = max(1, self.tokens // 2)
            log.warning("memory ran out: the token budget is halved to %d", self.tokens)
            done_now = done
        finished = np.concatenate(done_now) if done_now else np.empty(0, np.int64)
        return pending[~np.isin(pending, finished)]


def choose_budget(model: Any, device: str) -> int:
    """Tokens of one batch that fit into the free memory beside the loaded model, with a factor of two to spare.

    One token's activations in a layer, all alive at once: the residual, its norm, queries, keys, values and their
    rotated copies, attention from two sides and merged, and three of the MLP's width.
    """
    config = model.config
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    per_token = (3 * hidden + 8 * heads + 3 * inner) * torch.finfo(model.dtype).bits // 8
    if device == "cpu":
        free, most = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), CPU_TOKENS
    else:
        free, most = torch.cuda.mem_get_info(device)[0], CUDA_TOKENS
    return max(SMALLEST, min(most, int(free // (2 * per_token))))


def _to_host(results: torch.Tensor) -> Callable[[], Float32]:
    """Send results to the host; the call that is returned waits for them, and for nothing that is begun later."""
    if results.device.type != "cuda":
        return lambda: results.cpu().numpy()
    host = torch.empty(results.shape, dtype=results.dtype, pin_memory=torch.cuda.is_available())
    host.copy_(results, non_blocking=True)
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(results.device))  # the current device may be another one

    def wait() -> Float32:
        arrived.synchronize()
        return np.array(host.numpy())  # a copy: pinned memory is scarce

    return wait


def _out_of_memory(error: BaseException) -> bool:
    cpu = "can't allocate memory" in str(error) or "not enough memory" in str(error)  # torch has no class for CPUs
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or cpu
