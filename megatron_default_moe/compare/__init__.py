"""Several arms over several seeds: run, paired by seed, and compared."""
