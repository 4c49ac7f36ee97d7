"""Everything that knows processes, devices and the file system."""
