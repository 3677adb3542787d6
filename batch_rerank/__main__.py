"""`python -m batch_rerank`: the command line where its script is not on the path."""

from batch_rerank.cli import main

if __name__ == "__main__":
    main()
