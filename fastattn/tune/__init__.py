"""`fastattn bench tune`: finds the fastest tiles of the Triton attention kernels on the machine at hand."""
