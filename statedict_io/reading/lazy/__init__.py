"""A file of which only what is asked for is read: ``open_checkpoint``, DCP's reader and ``convert`` stand on it."""
