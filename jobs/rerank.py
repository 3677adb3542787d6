"""Entry point for `ray job submit --working-dir . -- python jobs/rerank.py JOB.YAML [--set SECTION.KEY=VALUE …]`.

The same as `batch-rerank run`, with its exit codes. `ray job submit` itself ends with 1 on every failure: the last line
of the job's log has the code.
"""

import sys

from batch_rerank.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
