"""Published numbers (`published.csv`) as package data, installed as `neco_bench.leaderboards`."""
