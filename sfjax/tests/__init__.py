"""Tests of sfjax alone; `parity_tests` holds it against the torch twin, the reference and the peers."""
