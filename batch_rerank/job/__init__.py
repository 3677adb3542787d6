"""The job: plan, read_unit, encode, score, rank, write. `run_local` composes them in a loop, `ray_run` on Ray Data."""
