"""The study of Adam's moment as a Fisher diagonal: its runs, what is measured, what is concluded."""
