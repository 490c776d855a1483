"""What is measured on the device at hand: ops (`worker`), and whole steps in fresh processes (`training`, `compare`)."""
