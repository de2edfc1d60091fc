"""From files to micro-batches: reading and preparing volumes, the store, the plan of a sample, the loader."""
