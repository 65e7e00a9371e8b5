"""The commands of ``statedict-io``, a module each; ``__main__`` parses, they do and print."""
