"""What writes pages and tables from the JSON in tests/bench/results/."""
