"""Pure planning: ranges, windows, cutting. Rule: nothing in this package awaits, opens a file or reads a clock."""
