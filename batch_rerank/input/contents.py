"""Which bytes a file holds, so that a fresh copy (cp -r, touch) is the same source and an edit of equal size is not.

A store's etag says it. A local disk says nothing, so the bytes are hashed: as fast as they are read, several files at a
time (1.5 GB/s a core). Modification times only spare that work where a file is untouched since it was hashed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from batch_rerank.input.shards import check_unchanged
from batch_rerank.store.filesystem import File, Options, input_errors, locate

HASH_THREADS = 4
READ_BYTES = 4 * 2**20
Key = tuple[str, int, str]
"""A file as it was: URL, bytes, version."""


def contents(files: Sequence[tuple[str, File]], known: Mapping[Key, str], options: Options) -> list[str]:
    """What each file holds: "etag:…" or "sha256:…". known: of files that were hashed before.

    Raises InputError where a file changes meanwhile.
    """

    def content(entry: tuple[str, File]) -> str:
        url, file = entry
        if not file.version.startswith("mtime:"):
            return f"etag:{file.version}"
        seen = known.get((url, file.size, file.version))
        if seen is not None and file.version != "mtime:":  # of a store that has no times
            return seen
        location = locate(url, options)
        digest = hashlib.sha256()
        with input_errors(location), location.open() as opened:
            while block := opened.read(READ_BYTES):
                digest.update(block)
        check_unchanged(location, file)
        return f"sha256:{digest.hexdigest()}"

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(content, files))
