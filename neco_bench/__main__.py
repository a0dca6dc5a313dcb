"""Run the command line: `python -m neco_bench` is the same as `neco-bench`."""

from neco_bench.cli.app import main

if __name__ == "__main__":
    main()
