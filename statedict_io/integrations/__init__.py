"""What plugs into other libraries; a module each, imported only by who uses that library."""
