"""Networks of others, re-stated in torch."""
