"""The conformance suite: one reference, recorded cases, and every implementation held to them."""
