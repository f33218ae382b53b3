"""The study of Adam's moment as a Fisher diagonal: runs, measurements, conclusions."""
