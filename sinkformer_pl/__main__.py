"""python -m sinkformer_pl."""

from sinkformer_pl.cli import main

if __name__ == "__main__":
    main()
