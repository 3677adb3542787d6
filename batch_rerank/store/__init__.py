"""Bytes and bookkeeping on disks and object stores: fsspec and pyarrow. No torch and no ray; a test asserts it."""
