"""What the parts of nested containers are called: dotted names of tensors, from objects or from a stream not run."""
