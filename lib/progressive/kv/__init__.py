"""Keys and values of requests in fast memory, each at its own tier, and attention over them."""
