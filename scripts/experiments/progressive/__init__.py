"""What requests at their own precision cost, for docs/progressive.md; they are in lib/progressive."""
