"""Memory behind the device: files on a disk, pinned memory of the host."""
