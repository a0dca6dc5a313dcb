"""`python -m neco_bench` is `neco-bench`."""

from neco_bench.cli import main

if __name__ == "__main__":
    main()
