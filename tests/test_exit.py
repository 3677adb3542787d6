"""The exit code of the command line is the verb's own, whatever a library's thread does while Python ends."""

import subprocess
import sys

import pytest

READER_LEFT_BEHIND = """
import io, threading, time
import pyarrow as pa, pyarrow.parquet as pq
from batch_rerank.cli import main

class Slow(io.BytesIO):
    def read(self, *size):
        reading.set()
        time.sleep(0.3)  # longer than the verb: this thread of Arrow's wants Python's lock when there is none any more
        return super().read(*size)

reading, sink = threading.Event(), io.BytesIO()
pq.write_table(pa.table({f"c{i}": range(1000) for i in range(20)}), sink)
footer = pq.ParquetFile(io.BytesIO(sink.getvalue())).metadata
file = pq.ParquetFile(Slow(sink.getvalue()), metadata=footer, pre_buffer=True)
threading.Thread(target=file.read, daemon=True).start()
reading.wait()
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["verify", "/nowhere"], 6),
        (["no-such-verb"], 2),
        (["models", "--json"], 0),
    ],
)
def test_a_thread_that_is_left_behind_does_not_change_it(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READER_LEFT_BEHIND + "main()", *arguments], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr


def test_a_process_that_calls_it_keeps_its_own_end() -> None:
    script = """
import atexit, sys
from batch_rerank.cli import main
atexit.register(print, "the end")
sys.argv[1:] = ["--version"]
for arguments in (["--version"], []):  # none are some too: they are the caller's
    try:
        main(arguments)
    except SystemExit:
        pass
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (3, "the end"), done.stderr


def test_what_was_printed_arrives_and_a_reader_that_has_gone_is_no_traceback() -> None:
    verb = f"{sys.executable} -m batch_rerank models --json"
    done = subprocess.run(["bash", "-c", f"{verb} | head -c 10"], capture_output=True, text=True)
    assert len(done.stdout) == 10
    assert "Traceback" not in done.stderr
