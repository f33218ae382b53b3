"""What requests at precisions of their own cost, for docs/progressive.md."""
