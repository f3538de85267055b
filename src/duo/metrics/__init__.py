"""Leaves: one file each. See `duo.plugins`."""
