"""Everything peculiar to LibreChat, in all its generations. Pure: no I/O, no clock."""
