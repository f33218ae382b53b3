"""The endpoint under load, and what strangers make of it."""
