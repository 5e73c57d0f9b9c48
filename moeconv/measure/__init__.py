"""What this machine can do: kernels beside the memory's limit, disks, the start of a run."""
