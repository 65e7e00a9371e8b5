"""The machine under us, alike on all systems: descriptors and directories, memory of host and devices, processes."""
