"""The formats other than torch's zip: which one a file is in, and what safetensors files look like."""
