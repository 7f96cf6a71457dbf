"""What measures and writes JSON to tests/bench/results/."""
