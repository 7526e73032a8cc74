"""`fastattn bench tune`: finds the fastest tiles of the Triton attention kernels on this machine."""
