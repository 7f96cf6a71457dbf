"""What benchmarks write and pages read: where it lies, and the form of a record that both need."""
