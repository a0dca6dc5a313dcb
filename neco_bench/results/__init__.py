"""Results: their schema, the folder they are kept in, what produced them, and the tables made of them.

The only package that writes result files. Prints nothing, imports no torch.
"""

from neco_bench.results.leaderboard import Published, Table, build_tables, read_published, write_leaderboard
from neco_bench.results.provenance import environment, peak_memory_mb
from neco_bench.results.schema import SCHEMA_VERSION, Result
from neco_bench.results.store import ResultStore

__all__ = [
    "SCHEMA_VERSION",
    "Published",
    "Result",
    "ResultStore",
    "Table",
    "build_tables",
    "environment",
    "peak_memory_mb",
    "read_published",
    "write_leaderboard",
]
