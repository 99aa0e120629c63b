"""A qcow2 file as clusters: its header area, its geometry, and reads within its bounds."""
