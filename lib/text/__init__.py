"""Text: what a user's files hold, read the same whatever program wrote them."""
