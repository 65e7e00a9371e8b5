"""The bytes of an archive, as csrc/archive and docs/format.md have them: layout, directory, checksums; without I/O."""
