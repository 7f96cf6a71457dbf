"""What a checkpoint loses and does: quality, equality of executors, answers, the records of all of it."""
