"""What pytest passes over here: programs for type checkers, which test_types.py reads and nobody runs."""

collect_ignore_glob = ["typed/*"]
