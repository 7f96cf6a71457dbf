"""Methods that gate neurons."""
