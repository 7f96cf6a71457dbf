"""Where a model comes from: what a person typed becomes an ordinary folder."""
