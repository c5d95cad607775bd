"""Files on a disk, an object store or in memory: one writer, retries."""
