"""S6 to S9* in one pass over memory, in C for CPUs: one source, built at first use, for every framework."""
