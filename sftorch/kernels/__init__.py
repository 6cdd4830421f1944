"""S6 to S9* in one pass over memory: C for CPUs, built at first use, and Triton for CUDA devices."""
